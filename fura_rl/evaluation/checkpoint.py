"""From what a user names (model, hub id, adapter checkpoint) to a plain checkpoint that vLLM can serve."""

from __future__ import annotations

import json
from pathlib import Path

from fura_rl.config import resolve_model

ADAPTER_FILE = "adapter_config.json"


def servable_checkpoint(name: str, base_model: str | None, scratch: Path) -> str:
    """A folder or hub id of a plain model; an adapter checkpoint is folded into its base and written to `scratch`.

    Raises:
        ValueError: where nothing is there, or an adapter's base model is not to be found.
    """
    adapter_file = Path(name) / ADAPTER_FILE
    if not adapter_file.is_file():
        if base_model:
            raise ValueError(f"--base_model is set, but {name!r} is no adapter checkpoint (it has no {ADAPTER_FILE})")
        return resolve_model(name)
    recorded = json.loads(adapter_file.read_text()).get("base_model_name_or_path")
    try:
        base = resolve_model(base_model or recorded)
    except ValueError as error:
        raise ValueError(f"the base model of adapter {name!r}: {error}. Name it with --base_model") from error
    return str(fold_checkpoint(base, name, scratch))


def fold_checkpoint(base_model: str, adapter: str, output_dir: Path) -> Path:
    """Write `base_model` with `adapter` folded in, as a plain checkpoint with its tokenizer."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import fura_rl  # noqa: F401  registers FuRA with PEFT

    model = AutoModelForCausalLM.from_pretrained(base_model, dtype="auto")
    folded = PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=True)
    folded.save_pretrained(output_dir)
    tokenizer_source = adapter if (Path(adapter) / "tokenizer_config.json").is_file() else base_model
    AutoTokenizer.from_pretrained(tokenizer_source).save_pretrained(output_dir)
    return output_dir
