"""LoRA (arXiv 2106.09685), PEFT's own; settings from TRL's `--lora_r`, `--lora_alpha`, `--lora_dropout`."""

from typing import Any

from peft import LoraConfig
from trl import ModelConfig

from fura_rl.adapters.methods.method import AdapterMethod


def settings(model_args: ModelConfig) -> dict[str, Any]:
    return {
        "r": model_args.lora_r,
        "lora_alpha": model_args.lora_alpha,
        "lora_dropout": model_args.lora_dropout,
        "use_rslora": model_args.use_rslora,
    }


METHOD = AdapterMethod(LoraConfig, settings, paper_learning_rate=9e-5, summary="low-rank update B A")
