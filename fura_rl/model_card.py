"""The README of an exported checkpoint: what it is, what it was made from, how well it stands for the policy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fura_rl.report import environment


def write_card(output_dir: Path, base_model: str, adapter: str, kind: str, figures: dict[str, str]) -> None:
    """Write `README.md` with the hub's metadata.

    Args:
        output_dir: the exported checkpoint.
        base_model: hub id or folder of the base.
        adapter: folder of the adapter that was exported.
        kind: "folded", or "lora".
        figures: what was measured of the export, by name.
    """
    config = json.loads((Path(adapter) / "adapter_config.json").read_text())
    method = str(config["peft_type"])
    versions = environment()["versions"]
    named = "base_model: " + base_model if len(base_model.split("/")) == 2 and not Path(base_model).exists() else ""
    lines = [
        "---",
        f"library_name: {'peft' if kind == 'lora' else 'transformers'}",
        *([named] if named else []),
        "tags: [fura_rl, grpo, math]",
        "---",
        "",
        f"# {Path(adapter).name}",
        "",
        DESCRIPTIONS[kind].format(method=method, base=Path(base_model).name if not named else base_model),
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in figures.items()),
        f"| adapter settings | `{json.dumps(plain_settings(config))}` |",
        f"| versions | {', '.join(f'{name} {version}' for name, version in versions.items())} |",
        "",
        "```python",
        *USAGE[kind],
        "```",
    ]
    (output_dir / "README.md").write_text("\n".join(lines) + "\n")


DESCRIPTIONS = {
    "folded": "`{base}` trained with a {method} adapter, which is folded into its weights: a plain checkpoint, to be "
    "loaded without `fura_rl` or `peft`.",
    "lora": "A LoRA for `{base}` that approximates a {method} adapter: each layer's update cut to its leading singular "
    "directions. The error is stated below; the exact policy is the folded model.",
}
USAGE = {
    "folded": (
        "from transformers import AutoModelForCausalLM",
        "",
        "model = AutoModelForCausalLM.from_pretrained(PATH)",
    ),
    "lora": ("from peft import AutoPeftModelForCausalLM", "", "model = AutoPeftModelForCausalLM.from_pretrained(PATH)"),
}


def plain_settings(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of an adapter that say something: no empty ones, and no paths of the machine it was trained on."""
    hidden = ("base_model_name_or_path", "auto_mapping", "revision", "inference_mode", "peft_version", "task_type")
    return {key: value for key, value in sorted(config.items()) if key not in hidden and value not in (None, {}, [])}
