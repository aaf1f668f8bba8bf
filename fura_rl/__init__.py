"""RL post-training with FuRA adapters.

Importing this package registers FuRA (and MiLoRA and LoRA with a trained backbone) with PEFT, so that
`peft.get_peft_model` and `PeftModel.from_pretrained` know them.
The trainer is imported on first use: it brings TRL and vLLM, which an adapter alone does not need.
"""

# ruff: noqa: E402  telemetry goes off before the libraries that would send it are imported
from fura_rl.telemetry import turn_off

turn_off()

from typing import TYPE_CHECKING, Any

from fura_rl.adapters.fura_config import FuraConfig, FuraPeftType
from fura_rl.adapters.fura_tuner import FuraModel
from fura_rl.adapters.methods import lora_full, milora  # noqa: F401  registered with PEFT as they are imported
from fura_rl.adapters.registration import register

if TYPE_CHECKING:
    from fura_rl.trainer import FuraGRPOTrainer

__all__ = ["FuraConfig", "FuraGRPOTrainer", "FuraModel"]
__version__ = "0.1.0"

register(FuraPeftType.FURA, FuraConfig, FuraModel)


def __getattr__(name: str) -> Any:
    if name == "FuraGRPOTrainer":
        from fura_rl.trainer import FuraGRPOTrainer

        return FuraGRPOTrainer
    raise AttributeError(f"module 'fura_rl' has no attribute {name!r}")
