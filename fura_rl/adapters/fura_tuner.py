"""FuRA as a PEFT tuner: puts `FuraLinear` in the place of every targeted linear layer, and registers with PEFT."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, resolve_quantization_backend
from peft.utils.other import ModulesToSaveWrapper, get_pattern_key
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend, get_quantization_kwargs
from torch import nn
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from fura_rl.adapters.fura_config import FuraConfig
from fura_rl.adapters.fura_layer import FuraLinear

# The paper adapts all seven projections; for architectures that name them otherwise PEFT's own choice stands.
PAPER_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PAPER_ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")
QUIET_SECONDS = 2.0  # a conversion that takes longer shows its progress


class FuraModel(BaseTuner):
    """The model with FuRA adapters injected; made by `peft.get_peft_model(model, FuraConfig(...))`.

    Layers are converted one after another: beyond the model and its adapters, memory holds one layer's worth.
    """

    prefix: str = "fura_"
    tuner_layer_cls = FuraLinear
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING | dict.fromkeys(
        PAPER_ARCHITECTURES, PAPER_TARGETS
    )

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = self._prepare_adapter_config(self.peft_config[adapter_name], self.get_model_config(model))
        total = None
        if config.target_modules and config.target_modules != "all-linear":
            total = sum(bool(self._check_target_module_exists(config, name)) for name, _ in model.named_modules())
        with tqdm(total=total, desc="Converting to FuRA", unit="layer", delay=QUIET_SECONDS) as progress:
            self._progress = progress
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        del self._progress
        warn_of_what_is_left(model, self.peft_config[adapter_name], adapter_name)

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
        options = {
            "block_size": find_override(fura_config.block_size_pattern, current_key),
            "block_axis": find_override(fura_config.block_axis_pattern, current_key),
            "head_dim": head_dimension(self.get_model_config(self.model)),
        }
        if isinstance(target, FuraLinear):
            target.update_layer(adapter_name, fura_config, **options)
        else:
            check_supported(target, current_key)
            options |= get_quantization_kwargs(self.model)
            layer = FuraLinear(target, adapter_name, fura_config, layer_name=current_key, **options)
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)  # an additional adapter is not trainable until it is chosen
            self._replace_module(parent, target_name, layer, target)
        if hasattr(self, "_progress"):
            self._progress.update()

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """PEFT makes 16-bit adapters float32, or keeps the base dtype; a `core_dtype` that was asked for stands."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)
        if core_dtype := self.peft_config[adapter_name].core_dtype:
            restore_core_dtype(self.model, adapter_name, core_dtype)
        elif not autocast_adapter_dtype:
            for layer in fura_layers(self.model):
                if adapter_name in layer.fura_core:
                    layer.fura_core[adapter_name].to(layer.base_dtype)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT's hook around a forward, which drops `adapter_names` where a method does not ask for them."""
        if (names := kwargs.get("adapter_names")) is not None:
            raise ValueError(
                f"adapter_names={names}: FuRA has no batches of mixed adapters; call set_adapter(...) and run the rows "
                "of each adapter on their own"
            )
        yield

    def add_weighted_adapter(self, adapters: list[str], weights: list[float], adapter_name: str) -> None:
        """A new adapter whose update is the weighted sum of others': their block matrices combine exactly.

        It adapts every layer that one of them adapts, each with the blocks that it has there.

        Raises:
            ValueError: where an adapter is unknown or the name taken, two have different blocks on a layer, or one is
                in core form or trains whole modules.
        """
        if len(adapters) != len(weights):
            raise ValueError(f"{len(adapters)} adapters but {len(weights)} weights; give one weight for each")
        if unknown := [name for name in adapters if name not in self.peft_config]:
            raise ValueError(f"there is no adapter {unknown}; the model has {list(self.peft_config)}")
        if adapter_name in self.peft_config:
            raise ValueError(f"there is an adapter {adapter_name!r} already; delete it first, or give another name")
        layers = [layer for layer in fura_layers(self.model) if not layer.fura_core.keys().isdisjoint(adapters)]
        wholes = [module for module in self.model.modules() if isinstance(module, ModulesToSaveWrapper)]
        if any(not whole.modules_to_save.keys().isdisjoint(adapters) for whole in wholes):
            raise ValueError(
                f"adapters {adapters} train whole modules too (modules_to_save), which have no blocks to combine; "
                "combine adapters without modules_to_save"
            )
        config = copy.deepcopy(self.peft_config[adapters[0]])
        # A name alone would be a suffix to PEFT, and match the layer of that name inside another module too.
        config.target_modules = "|".join(re.escape(layer.layer_name) for layer in layers)
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
        config.bias = "none"  # trained biases are the model's own, whichever adapter is active
        config.block_axis_pattern, config.block_size_pattern = {}, {}
        for layer in layers:
            layer.check_room(adapter_name, config)
            kinds = {(c.axis, c.block_size) for name, c in layer.fura_core.items() if name in adapters}
            if len(kinds) > 1:
                raise ValueError(f"{layer.layer_name}: adapters {adapters} have different blocks {sorted(kinds)}")
            exactly = f"^{re.escape(layer.layer_name)}"
            [(config.block_axis_pattern[exactly], config.block_size_pattern[exactly])] = kinds
        self.peft_config[adapter_name] = config
        self.inject_adapter(self.model, adapter_name)
        for layer in layers:
            held, mixed = layer.fura_core, layer.fura_core[adapter_name]
            parts = [(held[name], weight) for name, weight in zip(adapters, weights, strict=True) if name in held]
            mixed.to(parts[0][0].delta_r.dtype)
            mixed.fit(torch.stack([weight * core.update() for core, weight in parts]).sum(0))


def fura_layers(model: nn.Module) -> list[FuraLinear]:
    return [module for module in model.modules() if isinstance(module, FuraLinear)]


def matches(pattern: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def find_override(patterns: dict[str, Any], name: str) -> Any | None:
    """The value of the first pattern that matches a module's name, as PEFT reads its `rank_pattern`."""
    return patterns.get(get_pattern_key(patterns.keys(), name)) if patterns else None


def head_dimension(model_config: dict[str, Any]) -> int | None:
    """Columns per attention head, from a transformers config; None where it has no heads."""
    if model_config.get("head_dim"):
        return model_config["head_dim"]
    heads, hidden = model_config.get("num_attention_heads"), model_config.get("hidden_size")
    return hidden // heads if heads and hidden else None


def restore_core_dtype(model: nn.Module, adapter_name: str, core_dtype: str) -> None:
    """Give an adapter's trained tensors the dtype that was asked for, whatever another library cast them to."""
    for layer in fura_layers(model):
        if adapter_name in layer.fura_core:
            for parameter in layer.fura_core[adapter_name].parameters():
                parameter.data = parameter.data.to(getattr(torch, core_dtype))


def warn_of_what_is_left(model: nn.Module, config: FuraConfig, adapter_name: str) -> None:
    """Of every adapter, not by PEFT's hook after an injection, which it calls for the first alone."""
    layers = [layer for layer in fura_layers(model) if adapter_name in layer.fura_core]
    warn_of_dropped_directions(layers)
    warn_of_fused_experts(model)
    if fell_back := [layer.layer_name for layer in layers if layer.head_dim_fell_back]:
        warnings.warn(
            f"block_size='head' does not divide {len(fell_back)} layers, e.g. {fell_back[0]}; they have "
            "block_size='auto'",
            stacklevel=2,
        )
    for setting in ("block_size_pattern", "block_axis_pattern"):
        names = [layer.layer_name for layer in layers]
        unmatched = [key for key in getattr(config, setting) if not any(matches(key, name) for name in names)]
        if unmatched:
            warnings.warn(f"{setting} has keys that match no adapted module: {unmatched}", stacklevel=2)


def warn_of_dropped_directions(layers: list[FuraLinear]) -> None:
    """Say how many directions have no pretrained column and will stay still (rank-deficient blocks)."""
    dropped = {layer.layer_name: layer.dropped_directions for layer in layers}
    if total := sum(dropped.values()):
        worst = max(dropped, key=dropped.__getitem__)
        warnings.warn(
            f"{total} block directions have no pretrained column (singular value 0) and stay still; "
            f"most in {worst} ({dropped[worst]})",
            stacklevel=2,
        )


def warn_of_fused_experts(model: nn.Module) -> None:
    """Say that experts held as stacked parameters (experts, in, out) stay frozen: they are no modules to adapt."""
    fused = [name for name, p in model.named_parameters() if p.ndim == 3 and "experts" in name and "fura_" not in name]
    if fused:
        warnings.warn(
            f"{len(fused)} fused expert parameters, e.g. {fused[0]}, are not linear modules; FuRA leaves them frozen",
            stacklevel=2,
        )


def check_supported(target: nn.Module, name: str) -> None:
    """Raises TypeError where FuRA cannot adapt this module, naming it and the way out."""
    if isinstance(target, BaseTunerLayer):
        raise TypeError(
            f"{name} carries another adapter already ({type(target).__module__}.{type(target).__name__}); "
            "merge_and_unload() or unload() that one first"
        )
    backend = resolve_quantization_backend(target, get_apply_tensor_subclass=lambda: None)
    if isinstance(backend, ForwardOnlyQuantizationBackend):
        raise TypeError(
            f"{name} is quantized by {backend.backend_name}, which gives no weight back, and FuRA needs its SVD; "
            "load the model with bitsandbytes or unquantized"
        )
    if backend is None and not isinstance(target, nn.Linear | Conv1D):
        raise TypeError(f"{name} is a {type(target).__name__}; FuRA adapts linear layers (nn.Linear, Conv1D) only")
    if backend is None and not (target.weight.is_floating_point() and target.weight.itemsize >= 2):
        raise TypeError(  # float8 is floating point, but torch has no arithmetic for it
            f"{name} has {target.weight.dtype} weights; FuRA needs a floating-point weight of 16 bits or more: load "
            "the model in bfloat16, or quantized with bitsandbytes"
        )
