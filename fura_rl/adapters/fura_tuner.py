"""FuRA as a PEFT tuner: puts `FuraLinear` in the place of every targeted `nn.Linear`, and registers with PEFT."""

from __future__ import annotations

import warnings
from typing import Any

import peft.mapping
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, resolve_quantization_backend
from torch import nn

from fura_rl.adapters.fura_config import FuraConfig, FuraPeftType
from fura_rl.adapters.fura_layer import FuraLinear

# The paper adapts all seven projections; for architectures that name them otherwise PEFT's own choice stands.
PAPER_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PAPER_ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")


class FuraModel(BaseTuner):
    """The model with FuRA adapters injected; made by `peft.get_peft_model(model, FuraConfig(...))`."""

    prefix: str = "fura_"
    tuner_layer_cls = FuraLinear
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING | dict.fromkeys(
        PAPER_ARCHITECTURES, PAPER_TARGETS
    )

    def _create_and_replace(
        self,
        fura_config: FuraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional_kwargs: Any,
    ) -> None:
        if isinstance(target, FuraLinear):
            target.update_layer(adapter_name, fura_config)
            return
        check_supported(target, current_key)
        layer = FuraLinear(target, adapter_name, fura_config, layer_name=current_key)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # an additional adapter is not trainable until it is chosen
        self._replace_module(parent, target_name, layer, target)

    def _post_injection_hook(self, model: nn.Module, config: FuraConfig, adapter_name: str) -> None:
        """Say how many directions have no pretrained column and will stay still (rank-deficient blocks)."""
        dropped = {layer.layer_name: layer.dropped_directions for layer in fura_layers(model)}
        if total := sum(dropped.values()):
            worst = max(dropped, key=dropped.__getitem__)
            warnings.warn(
                f"{total} block directions have no pretrained column (singular value 0) and stay still; "
                f"most in {worst} ({dropped[worst]})",
                stacklevel=2,
            )


def fura_layers(model: nn.Module) -> list[FuraLinear]:
    return [module for module in model.modules() if isinstance(module, FuraLinear)]


def check_supported(target: nn.Module, name: str) -> None:
    """Raises TypeError where FuRA cannot adapt this module, naming it."""
    if resolve_quantization_backend(target) is not None:
        raise TypeError(f"{name} is quantized ({type(target).__name__}); FuRA on quantized layers is not built yet")
    if not isinstance(target, nn.Linear):
        raise TypeError(f"{name} is a {type(target).__name__}; FuRA adapts torch.nn.Linear only")
    if not target.weight.is_floating_point():
        raise TypeError(f"{name} has {target.weight.dtype} weights; FuRA needs a floating-point weight")


def register_with_peft() -> None:
    """Make PEFT know FuRA: config, tuner and parameter prefix, with `peft.utils.register_peft_method`'s checks.

    That function wants a member of PEFT's own enum, which belongs to PEFT; the three tables take any `str` enum
    (read in peft 0.21).  Calling this twice is harmless.

    Raises:
        KeyError: where another package has taken the name or the prefix.
    """
    tables = (
        (peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING, FuraConfig),
        (peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING, FuraModel),
        (peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING, FuraModel.prefix),
    )
    for table, entry in tables:
        if table.get(FuraPeftType.FURA, entry) is not entry:
            raise KeyError("another package has registered a PEFT method called 'FURA'; import only one of them")
    prefixes = peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING
    if any(prefix == FuraModel.prefix and key != FuraPeftType.FURA for key, prefix in prefixes.items()):
        raise KeyError(f"the parameter prefix {FuraModel.prefix!r} belongs to another PEFT method")
    for table, entry in tables:
        table[FuraPeftType.FURA] = entry
