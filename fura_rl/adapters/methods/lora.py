"""LoRA (arXiv 2106.09685), PEFT's own; settings from TRL's `--lora_r`, `--lora_alpha`, `--lora_dropout`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from peft import LoraConfig

from fura_rl.adapters.methods.method import AdapterMethod

if TYPE_CHECKING:
    from trl import ModelConfig


def settings(model_args: ModelConfig) -> dict[str, Any]:
    """TRL's `--lora_*` settings as `LoraConfig` has them."""
    return {
        "r": model_args.lora_r,
        "lora_alpha": model_args.lora_alpha,
        "lora_dropout": model_args.lora_dropout,
        "use_rslora": model_args.use_rslora,
    }


def settings_with(**changes: Any) -> Callable[[ModelConfig], dict[str, Any]]:
    """TRL's `--lora_*` settings with what a relative of LoRA sets otherwise."""
    return lambda model_args: settings(model_args) | changes


METHOD = AdapterMethod(
    config_class=LoraConfig,
    summary="low-rank update B A",
    paper="arXiv 2106.09685",
    paper_learning_rate=9e-5,
    limits="updates of rank r only",
    settings=settings,
    capacity="r",
    quantized_base=True,
)
