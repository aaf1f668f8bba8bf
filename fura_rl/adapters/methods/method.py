"""What the table of adapter methods holds of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from peft import PeftConfig

if TYPE_CHECKING:
    from torch import nn
    from transformers import TrainingArguments
    from trl import ModelConfig


@dataclass(frozen=True)
class AdapterMethod:
    """One way to train a policy.

    Args:
        config_class: its PEFT config; None where the model's own weights are trained.
        summary: what is trained, in a few words.
        paper: where the method was published.
        paper_learning_rate: the default of the FuRA paper's RL runs where `rate_of` is "FuRA", else that of the
            method's own paper, for supervised fine-tuning; None where neither states one.
        limits: what it cannot do.
        settings: turns TRL's `ModelConfig` (its `lora_*` fields) into the settings of the config or the optimizer.
        capacity: the setting that decides how many parameters are trained, None where nothing does.
        capacity_grows: whether a larger value of it trains more.
        load_in_4bit: the base model is loaded in NF4 with double quantization.
        quantized_base: whether it can be trained over a 4-bit or 8-bit base, and served.
        shifts_base: it takes its start out of the base weight, so the adapter switched off is not the base model.
        optimizer: for a method that lives in its optimizer: (training arguments, settings) -> class and arguments.
        optimizer_settings: names and defaults of what `adapter_kwargs` may hold where there is no config.
        freeze: called with the policy before training, where there is no config that freezes it.
        count: trained parameters, where `requires_grad` does not tell: (policy, settings) -> number.
    """

    config_class: type[PeftConfig] | None
    summary: str
    paper: str
    paper_learning_rate: float | None
    rate_of: str = "FuRA"
    limits: str = ""
    settings: Callable[[ModelConfig], dict[str, Any]] = lambda model_args: {}
    capacity: str | None = None
    capacity_grows: bool = True
    load_in_4bit: bool = False
    quantized_base: bool = False
    shifts_base: bool = False
    optimizer: Callable[[TrainingArguments, dict[str, Any]], tuple[type, dict[str, Any]]] | None = None
    optimizer_settings: Mapping[str, Any] = field(default_factory=dict)
    freeze: Callable[[nn.Module, list[str]], None] | None = None
    count: Callable[[nn.Module, dict[str, Any]], int] | None = None
