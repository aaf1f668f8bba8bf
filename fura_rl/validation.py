"""What is wrong with the settings of a run: all of it at once, each fault with key, value, expectation, nearest valid.

Looks at settings as they were given, before the dataclasses are made, since those stop at their first fault.  Types
and choices are argparse's own reading of the fields; ranges and what must fit together stand in the tables below.
"""

from __future__ import annotations

import argparse
import dataclasses
import enum
import json
import math
import os
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any
from urllib.parse import urlparse

from trl import TrlParser

from fura_rl.alarms import AlarmSettings

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Given:
    """One setting as it was given: a tuple of command-line words, or a value of a YAML file."""

    value: Any
    where: str

    def words(self) -> list[str]:
        """As the command line would say it."""
        return [str(v) for v in self.value] if isinstance(self.value, list | tuple) else [str(self.value)]


# settings that are a plain string to argparse, and what they may be
CHOICES: dict[str, tuple[str, ...]] = {
    "vllm_dtype": ("float32", "bfloat16", "float16"),
    "vllm_mode": ("colocate", "server"),
    "scale_rewards": ("group", "batch", "none", "True", "False"),
    "vllm_importance_sampling_mode": ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
    "loss_type": ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"),
    "importance_sampling_level": ("token", "sequence"),
}

Rule = tuple[str, Callable[[float], bool]]
POSITIVE: Rule = ("1 or more", lambda value: value >= 1)
NOT_NEGATIVE: Rule = ("0 or more", lambda value: value >= 0)
POSITIVE_NUMBER: Rule = ("more than 0", lambda value: value > 0)
DECAY: Rule = ("at least 0 and less than 1", lambda value: 0 <= value < 1)
SHARE: Rule = ("a share between 0 and 1", lambda value: 0 <= value <= 1)
PART: Rule = ("more than 0 and at most 1", lambda value: 0 < value <= 1)
RULES: dict[str, Rule] = {
    **dict.fromkeys(
        (
            "eval_samples", "generation_batch_size", "gradient_accumulation_steps", "lora_alpha", "lora_r",
            "max_completion_length", "num_iterations", "per_device_eval_batch_size", "per_device_train_batch_size",
            "save_total_limit", "steps_per_generation", "sync_probe_every", "vllm_max_model_length",
            "vllm_tensor_parallel_size",
        ),
        POSITIVE,
    ),
    **dict.fromkeys(
        (
            "adam_epsilon", "alarm_gap_growth", "alarm_grad_norm", "alarm_kl", "alarm_patience", "alarm_reward_spread",
            "beta", "epsilon", "epsilon_high", "eval_problems", "learning_rate", "max_grad_norm", "seed",
            "sync_audit_every", "warmup_steps", "weight_decay",
        ),
        NOT_NEGATIVE,
    ),
    **dict.fromkeys(
        (
            "eval_steps", "logging_steps", "repetition_penalty", "save_steps", "sync_probe_tolerance", "temperature",
            "vllm_server_timeout",
        ),
        POSITIVE_NUMBER,
    ),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "lora_dropout"), DECAY),
    "min_p": SHARE,
    "top_k": ("1 or more, or 0 for all tokens", lambda value: value >= -1),  # -1 is vLLM's own word for 0
    **dict.fromkeys(("vllm_gpu_memory_utilization", "top_p"), PART),
    **dict.fromkeys((f.name for f in dataclasses.fields(AlarmSettings) if f.name.endswith("_frac")), SHARE),
    "alarm_update_cosine": ("between -1 and 1", lambda value: -1 <= value <= 1),
    "num_generations": ("2 or more: an advantage is a difference within a group", lambda value: value >= 2),
    "max_steps": ("1 or more, or -1 for num_train_epochs", lambda value: value == -1 or value >= 1),
}  # fmt: skip


def faults_of(given: Mapping[str, Given], dataclasses_: Sequence[type]) -> list[str]:
    """One text for every fault; settings that are at fault are left out of what is checked together."""
    fields = {field.name: field for cls in dataclasses_ for field in dataclasses.fields(cls) if field.init}
    hints = {name: hint for cls in dataclasses_ for name, hint in typing.get_type_hints(cls).items()}
    parser = TrlParser(dataclasses_, allow_abbrev=False, exit_on_error=False)
    values = vars(parser.parse_known_args([])[0])
    faults: dict[str, str] = {}
    for name, setting in given.items():
        try:
            values[name] = read(parser, name, setting, fields[name], hints[name])
        except ValueError as error:
            faults[name] = str(error)
    for check in TOGETHER:
        names = TOGETHER[check]
        if not faults.keys() & set(names) and (fault := check(values)):
            faults[check.__name__] = fault
    return list(faults.values())


def unknown(name: str, where: str, known: Sequence[str]) -> str:
    near = get_close_matches(name, known, n=1)
    return f"{name!r} in {where}" + (f" (did you mean {near[0]!r}?)" if near else "")


def read(parser: TrlParser, name: str, given: Given, field: dataclasses.Field, hint: Any) -> Any:
    """The value as the run gets it.

    Raises:
        ValueError: where it has the wrong type, is no valid choice, or is out of range.
    """
    allowed = {typing.get_origin(part) or part for part in union(hint)}
    choices = choices_of(field, hint) or CHOICES.get(name, ())
    expected = expectation(allowed, choices)
    if not isinstance(given.value, tuple):  # argparse takes a default as it is, so a value of YAML is looked at here
        if given.value is None and (type(None) in allowed or field.default is None):
            return None
        if isinstance(given.value, dict) and dict in allowed:
            return given.value
        if isinstance(given.value, list) and {list, str} <= allowed:  # the command line takes one of them
            return given.value
        misfit = isinstance(given.value, list) != (list in allowed) and str not in allowed
        if misfit or isinstance(given.value, dict) or given.value is None:
            raise ValueError(fault(name, given, expected))
    try:
        parsed, left_over = parser.parse_known_args([f"--{name}", *given.words()])
    except argparse.ArgumentError as error:
        raise ValueError(fault(name, given, expected, choices)) from error
    value = getattr(parsed, name)
    if left_over:
        one = "one value; a list goes into a YAML file" if list in allowed else f"{expected}, one only"
        raise ValueError(fault(name, given, one))
    return in_range(name, given, value, choices)


def in_range(name: str, given: Given, value: Any, choices: Sequence[str]) -> Any:
    """`value`, where it is a valid choice and keeps its rule."""
    if choices and str(getattr(value, "value", value)) not in choices:
        raise ValueError(fault(name, given, expectation(set(), choices), choices))
    if name in RULES and isinstance(value, int | float):
        expected, holds = RULES[name]
        if not math.isfinite(value) or not holds(value):
            raise ValueError(fault(name, given, expected))
    return value


def fault(name: str, given: Given, expected: str, choices: Sequence[str] = ()) -> str:
    shown = " ".join(given.value) if isinstance(given.value, tuple) else given.value
    near = get_close_matches(str(shown), choices, n=1)
    return f"{name}={shown!r} in {given.where}: expected {expected}" + (f"; did you mean {near[0]!r}?" if near else "")


def expectation(allowed: set[Any], choices: Sequence[str] = ()) -> str:
    if choices:
        return f"one of {', '.join(choices)}"
    words = {bool: "true or false", int: "a whole number", float: "a number", list: "a list", dict: "a mapping"}
    return " or ".join(text for kind, text in words.items() if kind in allowed) or "a text"


def union(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, type(int | str)) else (hint,)


def choices_of(field: dataclasses.Field, hint: Any) -> tuple[str, ...]:
    """The valid values of an enumeration, a literal, or a field that lists them."""
    for part in union(hint):
        if isinstance(part, type) and issubclass(part, enum.Enum):
            return tuple(str(member.value) for member in part)
        if typing.get_origin(part) is typing.Literal:
            return tuple(map(str, typing.get_args(part)))
    return tuple(field.metadata.get("choices", ()))


# What must fit together: each returns its fault, or nothing.


def whole_groups(values: Values) -> str | None:
    if values["generation_batch_size"] is not None and values["steps_per_generation"] is not None:
        return "generation_batch_size and steps_per_generation are both set: give one, the other follows"
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    step = values["per_device_train_batch_size"] * processes
    steps = values["steps_per_generation"] or values["gradient_accumulation_steps"]
    batch, group = values["generation_batch_size"] or step * steps, values["num_generations"]
    if values["generation_batch_size"] and batch % step:
        return (
            f"generation_batch_size={batch} is not divisible by per_device_train_batch_size={step // processes} x "
            f"{processes} processes = {step}; use {nearest_multiple(batch, step)}"
        )
    if batch % group:
        divisors = [size for size in range(2, batch + 1) if batch % size == 0]
        near = min(divisors, key=lambda size: abs(size - group), default=None)
        hint = f"; use num_generations={near}, or " if near else "; use "
        return (
            f"a batch of {batch} completions is not divisible into groups of num_generations={group}{hint}a batch of "
            f"{nearest_multiple(batch, group)} (per_device_train_batch_size x processes x gradient_accumulation_steps)"
        )
    return None


def nearest_multiple(number: int, of: int) -> int:
    return max(1, round(number / of)) * of


def room_for_completions(values: Values) -> str | None:
    longest, window = values["max_completion_length"], values["vllm_max_model_length"]
    if values["use_vllm"] and longest is not None and window is not None and longest >= window:
        return (
            f"max_completion_length={longest} leaves no room for a prompt within vllm_max_model_length={window}: raise "
            "the latter"
        )
    return None


def sampleable_temperature(values: Values) -> str | None:
    from fura_rl.evaluation.sampling import HIGHEST_TEMPERATURE as HIGHEST

    given = values["temperature"]
    too_high = values["use_vllm"] and given > HIGHEST
    return f"temperature={given:g} is more than {HIGHEST:g}, the highest that vLLM samples at" if too_high else None


def one_precision(values: Values) -> str | None:
    return "bf16 and fp16 are both true: choose one" if values["bf16"] and values["fp16"] else None


def readable_kwargs(values: Values) -> str | None:
    text = values["adapter_kwargs"]
    try:
        return None if not isinstance(text, str) or isinstance(json.loads(text), dict) else f"{text!r} is no mapping"
    except json.JSONDecodeError as error:
        return f"adapter_kwargs={text!r} is not JSON: {error}"


def known_adapter(values: Values) -> str | None:
    from fura_rl.adapters.registry import find_method

    return words_of(find_method, values["adapter"])


def known_rewards(values: Values) -> str | None:
    from rewards import load_reward

    texts = [words_of(load_reward, name) for name in values["reward_funcs"]]
    return "; ".join(filter(None, texts)) or None


def words_of(function: Callable[[str], Any], value: str) -> str | None:
    """What `function` objects to, if anything."""
    try:
        function(value)
    except ValueError as error:
        return str(error)
    return None


def installed_reporters(values: Values) -> str | None:
    from transformers.integrations import get_available_reporting_integrations
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK as KNOWN

    asked = values["report_to"]
    names = [asked] if isinstance(asked, str) else asked or []
    if names in (["all"], ["none"]):
        return None
    for name in names:
        if name not in KNOWN:
            near = get_close_matches(name, KNOWN, n=1)
            return f"report_to={name!r} is not one of all, none, {', '.join(sorted(KNOWN))}" + (
                f"; did you mean {near[0]!r}?" if near else ""
            )
    missing = [
        name
        for name in names
        if name in ("wandb", "trackio", "tensorboard", "mlflow", "comet_ml", "swanlab")
        and name not in get_available_reporting_integrations()
    ]
    return f"report_to={' '.join(missing)} is not installed: pip install {' '.join(missing)}" if missing else None


def addresses_of_servers(values: Values) -> str | None:
    given = values["vllm_server_base_url"]
    if "@" in (given or ""):
        return "vllm_server_base_url holds credentials, which logs would show: set FURA_ROLLOUT_TOKEN instead"
    if given is None or all(is_address(address.strip()) for address in given.split(",")):
        return None
    return f"vllm_server_base_url={given!r}: expected http://HOST:PORT, or several with commas between"


def is_address(text: str) -> bool:
    try:
        url = urlparse(text)
        return url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:  # of brackets that do not close, or a port that is no number
        return False


def something_to_evaluate(values: Values) -> str | None:
    during = getattr(values["eval_strategy"], "value", values["eval_strategy"])
    if during != "no" and not values["eval_problems"]:
        return f"eval_strategy={during!r} has nothing to evaluate: set eval_problems"
    return None


def resumable_checkpoints(values: Values) -> str | None:
    if values["save_only_model"]:
        return (
            "save_only_model=True leaves the optimizer out of the checkpoints, from which the same command would go on "
            "with a fresh one: leave it out, and set save_total_limit where checkpoints take too much room"
        )
    return None


def heard_adapter_settings(values: Values) -> str | None:
    """TRL's settings of LoRA that this project has others for: given, they would be passed over in silence."""
    instead = {
        "lora_target_modules": "adapter_target_modules",
        "lora_target_parameters": "adapter_kwargs with target_parameters",
        "lora_modules_to_save": "adapter_kwargs with modules_to_save",
        "use_dora": "adapter: dora",
    }
    given = {name: mend for name, mend in instead.items() if values[name]}
    faults = [f"{name}={values[name]!r} is not read here, since adapters are many: set {given[name]}" for name in given]
    return "; ".join(faults) or None


def named_output_dir(values: Values) -> str | None:
    return "output_dir='' names no folder for checkpoints and results" if values["output_dir"] == "" else None


def present_model(values: Values) -> str | None:
    from fura_rl.config import resolve_model

    name = values["model_name_or_path"]
    return words_of(resolve_model, name) if name else None


def present_data(values: Values) -> str | None:
    """A dry run and a mixture read no `dataset_name`."""
    from fura_rl.data import local_file

    name = values["dataset_name"]
    return words_of(local_file, name) if name and not values["dry_run"] and not values["datasets"] else None


TOGETHER: dict[Callable[[Values], str | None], tuple[str, ...]] = {
    whole_groups: (
        "num_generations", "per_device_train_batch_size", "gradient_accumulation_steps", "generation_batch_size",
        "steps_per_generation",
    ),
    room_for_completions: ("use_vllm", "max_completion_length", "vllm_max_model_length"),
    sampleable_temperature: ("use_vllm", "temperature"),
    one_precision: ("bf16", "fp16"),
    readable_kwargs: ("adapter_kwargs",),
    known_adapter: ("adapter",),
    known_rewards: ("reward_funcs",),
    installed_reporters: ("report_to",),
    addresses_of_servers: ("vllm_server_base_url",),
    something_to_evaluate: ("eval_strategy", "eval_problems"),
    resumable_checkpoints: ("save_only_model",),
    heard_adapter_settings: ("lora_target_modules", "lora_target_parameters", "lora_modules_to_save", "use_dora"),
    named_output_dir: ("output_dir",),
    present_model: ("model_name_or_path",),
    present_data: ("dataset_name", "dry_run", "datasets"),
}  # fmt: skip
