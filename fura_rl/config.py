"""Arguments of the training script: TRL's own dataclasses, and the few settings that TRL has no field for.

Flat YAML keys, command line over YAML, unknown keys refused with the nearest name.  Importing this module brings
neither vLLM nor datasets, so `--help` is quick.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

from fura_rl import validation
from fura_rl.grpo_config import FuraGRPOConfig
from fura_rl.quickstart.tasks import TASKS
from fura_rl.validation import Given

QUICKSTART = "quickstart"  # the default of the embedded tasks, whose names are model and dataset at once


@dataclass
class MathScriptArguments(ScriptArguments):
    """Data, reward and adapter of a math run.  Fields beyond TRL's `ScriptArguments`."""

    adapter: str = field(
        default="fura",
        metadata={
            "help": "How the policy is trained: launch/adapters.py lists the methods; peft:<ConfigClass> any other."
        },
    )
    adapter_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Further settings of the adapter's PEFT config, as JSON: '{\"block_size\": 64}'."},
    )
    adapter_target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Modules to adapt, or all-linear; default: the seven projections q, k, v, o, gate, up, down."
        },
    )
    reward_funcs: list[str] = field(
        default_factory=lambda: ["math_reward"],
        metadata={
            "help": "Reward functions by name, or by dotted path to your own in TRL's signature; one with settings as "
            "a call: 'overlong_penalty(max_tokens=2048, cache_tokens=512)'."
        },
    )
    prompt_column: str | None = field(
        default=None, metadata={"help": "Column of the problem text; default: problem, question or prompt."}
    )
    answer_column: str | None = field(
        default=None,
        metadata={"help": "Column of the gold; default: answer, solution or reward_model. Dots reach into a column."},
    )
    prompt_template: str | None = field(
        default=None, metadata={"help": "Prompt text with {problem} in it; default: ask for a boxed answer."}
    )
    prompt_template_file: str | None = field(
        default=None, metadata={"help": "Text file that holds the prompt template."}
    )
    system_prompt: str | None = field(default=None, metadata={"help": "System message before the problem."})
    eval_problems: int = field(
        default=0,
        metadata={
            "help": "Held-out problems to score before and after training (of dataset_test_split), and during it where "
            "eval_strategy asks for that; 0 for none."
        },
    )
    dataset_eval_split: str | None = field(
        default=None,
        metadata={
            "help": "Split that eval_strategy scores during training, and by which metric_for_best_model (e.g. pass@1) "
            "chooses a checkpoint; default: dataset_test_split."
        },
    )
    eval_samples: int = field(default=8, metadata={"help": "Samples a held-out problem for pass@k, beside greedy."})
    dry_run: bool = field(
        default=False,
        metadata={"help": "One step with a tiny stand-in model of the same architecture and embedded problems."},
    )

    def __post_init__(self) -> None:
        if isinstance(self.adapter_kwargs, str):
            try:
                self.adapter_kwargs = json.loads(self.adapter_kwargs)
            except json.JSONDecodeError as error:
                raise ValueError(f"adapter_kwargs={self.adapter_kwargs!r} is not JSON: {error}") from error


@dataclass(frozen=True)
class RunArguments:
    """Everything a run is made of."""

    script: MathScriptArguments
    training: FuraGRPOConfig
    model: ModelConfig
    mixture: DatasetMixtureConfig

    def resolved(self) -> dict[str, Any]:
        """All settings by name, as plain values."""
        values: dict[str, Any] = {}
        for part in (self.script, self.training, self.model, self.mixture):
            values |= part.to_dict() if hasattr(part, "to_dict") else dataclasses.asdict(part)
        return values


DATACLASSES = (MathScriptArguments, FuraGRPOConfig, ModelConfig, DatasetMixtureConfig)

# What `--help` shows; `--help_all` shows every setting of TRL and transformers.
HELP_GROUPS = {
    "What to train": ("model_name_or_path", "dtype", "adapter", "adapter_kwargs", "adapter_target_modules", "lora_r"),
    "Data and reward": (
        "dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split", "prompt_column", "answer_column",
        "prompt_template", "reward_funcs", "eval_problems", "eval_samples",
    ),
    "GRPO": (
        "learning_rate", "lr_scheduler_type", "max_steps", "num_generations", "per_device_train_batch_size",
        "gradient_accumulation_steps", "max_completion_length", "temperature", "beta", "scale_rewards", "loss_type",
    ),
    "Rollout engine and sync": (
        "vllm_mode", "vllm_gpu_memory_utilization", "vllm_max_model_length", "vllm_enable_sleep_mode", "vllm_dtype",
        "vllm_enforce_eager", "sync_probe_every", "sync_probe_tolerance",
        "sync_audit_every", "fold_rounding", "sync_mode", "vllm_server_base_url",
    ),
    "Alarms (alarm_*)": ("alarm_patience", "alarm_entropy_frac", "alarm_kl", "alarm_update_cosine"),
    "Run": (
        "output_dir", "seed", "bf16", "save_steps", "eval_strategy", "eval_steps", "metric_for_best_model",
        "load_best_model_at_end", "resume_from_checkpoint", "report_to", "log_completions", "dry_run",
    ),
}  # fmt: skip


# A dry run takes one short step on whatever machine it finds.
DRY_RUN_OVERRIDES = [
    *("--max_steps", "1"),
    *("--eval_problems", "0", "--eval_strategy", "no", "--load_best_model_at_end", "false"),
    *("--max_completion_length", "32"),
    *("--vllm_max_model_length", "256"),
    *("--vllm_gpu_memory_utilization", "0.1"),
    *("--vllm_enable_sleep_mode", "false"),
    *("--save_strategy", "no"),
    *("--report_to", "none"),
]


def parse_arguments(argv: list[str] | None = None, default_config: str | None = None) -> RunArguments:
    """Parse `--config FILE.yaml` and the command line.  `default_config` is read where neither names a model.

    Raises:
        ValueError: with every unknown key, value of a wrong type or out of range, and misfit; see `fura_rl.validation`.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if default_config and not {"--config", "--model_name_or_path"} & {token.partition("=")[0] for token in argv}:
        argv = ["--config", default_config, *argv]
    given = refuse_faults(argv)
    if "eval_strategy" in given and "num_generations_eval" not in given:
        argv += ["--num_generations_eval", "1"]  # held-out problems go to the engine, not into TRL's groups and batches
    if "dry_run" in given:
        argv += DRY_RUN_OVERRIDES + ([] if torch.cuda.is_available() else ["--use_cpu", "true"])
    parser = TrlParser(DATACLASSES, allow_abbrev=False)
    return RunArguments(*parser.parse_args_and_config(argv))


def given_settings(argv: Sequence[str]) -> dict[str, Given]:
    """Every setting of the command line and of the YAML file that it names, the command line winning."""
    given: dict[str, Given] = {}
    from_file: dict[str, Given] = {}
    starts = [i for i, word in enumerate(argv) if word.startswith("--")]
    for start, end in itertools.pairwise([*starts, len(argv)]):
        name, equals, value = argv[start].partition("=")
        words = [*([value] if equals else []), *argv[start + 1 : end]]
        if name == "--config":
            path = words[0] if words else ""
            from_file = {key: Given(value, path) for key, value in read_yaml(path).items()}
        given[name.removeprefix("--")] = Given(tuple(words), "the command line")
    return from_file | given


def refuse_faults(argv: Sequence[str]) -> set[str]:
    """Refuse settings that are unknown, of the wrong type, out of range, or do not fit together.

    Returns the names that were given.

    Raises:
        ValueError: with every fault.
    """
    given = given_settings(argv)
    known = {f.name for cls in DATACLASSES for f in dataclasses.fields(cls) if f.init}
    negated = {f"no_{name}" for name in known}  # argparse's form for switches that default to true
    strange = [validation.unknown(key, value.where, sorted(known)) for key, value in sorted(given.items())
               if key not in known | negated | {"config", "env"}]  # fmt: skip
    faults = [f"unknown setting {', '.join(strange)}; --help_all lists every setting"] if strange else []
    faults += validation.faults_of({key: value for key, value in given.items() if key in known}, DATACLASSES)
    if faults:
        several = f"{len(faults)} faults in the settings:" if len(faults) > 1 else ""
        raise ValueError("\n  ".join(filter(None, [several, *faults])))
    return set(given)


def read_yaml(path: str) -> dict[str, Any]:
    import yaml

    if not os.path.isfile(path):
        raise ValueError(f"--config {path!r} is not a file")
    with open(path) as file:
        content = yaml.safe_load(file)
    if not isinstance(content, dict):
        raise ValueError(f"--config {path!r} must hold a YAML mapping of settings")
    return content


def help_text(description: str) -> str:
    """The curated `--help`: each setting with its default and what it does."""
    fields = {f.name: f for cls in DATACLASSES for f in dataclasses.fields(cls)}
    lines = [description.strip(), ""]
    for group, names in HELP_GROUPS.items():
        lines.append(f"{group}:")
        for name in names:
            option = fields[name]
            default = option.default if option.default_factory is dataclasses.MISSING else option.default_factory()
            text = " ".join(str(option.metadata.get("help", "")).replace("%%", "%").split())
            text = text if len(text) <= 110 else text[:107].rsplit(" ", 1)[0] + " ..."
            lines.append(f"  --{name:<28} {text} [{default}]")
        lines.append("")
    lines.append("Settings are TRL's GRPOConfig, ModelConfig and ScriptArguments and a few of ours; --config FILE.yaml")
    lines.append("reads them from a file, the command line wins. --help_all lists all of them.")
    return "\n".join(lines)


def resolve_model(name: str | None) -> str:
    """The folder or hub id to load; the embedded model for the name of an embedded task.

    Raises:
        ValueError: where there is no name, or it looks like a path and no checkpoint is there.
    """
    if not name:
        raise ValueError("model_name_or_path is not set; give a hub id, a checkpoint folder, or 'quickstart'")
    if name in TASKS:
        return str(TASKS[name].base_model)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"model_name_or_path={name!r} is a folder without config.json, so not a checkpoint")
        if not any(path.glob("*.safetensors")) and (pickled := sorted(path.glob("*.bin"))):
            raise ValueError(
                f"model_name_or_path={name!r} has its weights as pickle ({pickled[0].name}), which runs code when it "
                "is loaded: convert it to safetensors, with save_pretrained on a machine where you trust it"
            )
        return str(path)
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ValueError(f"model_name_or_path={name!r} does not exist; give a checkpoint folder or a hub id (org/name)")
    return name
