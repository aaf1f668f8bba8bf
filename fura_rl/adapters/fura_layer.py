"""FuRA's layer: a frozen linear layer whose input passes through a trained block-diagonal matrix.

    y = W (x + D x) (+ bias)      D from the trained dS, dR and the frozen basis (blocks.block_update)

At the start D is exactly 0 and the layer is bit for bit the base layer.  Several active adapters add their updates.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn

from fura_rl.adapters import blocks
from fura_rl.adapters.fura_config import FuraConfig

RANDOM_UPDATE_STD = 0.1  # init_weights=False: relative size of the random update, large enough for tests to see


class FuraCore(nn.Module):
    """The tensors of one adapter on one layer: trained `delta_s`, `delta_r`; frozen `basis_v`, `basis_s`.

    A module of its own (not entries of a ParameterDict) so that parameter names carry the adapter name in the middle,
    where PEFT and TRL look for it.  The basis stays in float32 or wider whatever the model is cast to: rounding it to
    16 bits would move the adapted weight by more than a training step does.
    """

    def __init__(self, basis: blocks.SpectralBasis, save_basis: bool) -> None:
        super().__init__()
        n, b, r = basis.right_vectors.shape
        options = {"dtype": basis.right_vectors.dtype, "device": basis.right_vectors.device}
        self.delta_s = nn.Parameter(torch.zeros(n, r, **options))
        self.delta_r = nn.Parameter(torch.zeros(n, r, b, **options))
        self.register_buffer("basis_v", basis.right_vectors.contiguous(), persistent=save_basis)
        self.register_buffer("basis_s", basis.singular_values.contiguous())
        self.save_basis = save_basis

    @torch.no_grad()
    def randomize(self) -> None:
        scale = RANDOM_UPDATE_STD / self.delta_r.shape[-1] ** 0.5
        self.delta_r.normal_(std=scale)
        self.delta_s.normal_(std=scale).mul_(self.basis_s)

    def update(self) -> torch.Tensor:
        """D, (n, b, b)."""
        return blocks.block_update(self.delta_r, self.delta_s, self.basis_v, self.basis_s)

    def _apply(self, fn: Any, recurse: bool = True) -> FuraCore:
        before = {name: buffer for name, buffer in self.named_buffers()}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = getattr(self, name)
            if new.dtype != old.dtype and new.device.type != "meta":
                setattr(self, name, old.to(new.device))
        return self

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        error_messages = args[-1]
        saved = state_dict.get(prefix + "basis_s")
        if not self.save_basis and saved is not None and self.basis_s.device.type != "meta":
            same_shape = saved.shape == self.basis_s.shape
            if not same_shape or not torch.allclose(saved.to(self.basis_s), self.basis_s, rtol=1e-3, atol=1e-6):
                error_messages.append(
                    f"{prefix}basis_s: the adapter was saved with save_basis=False and its singular values do not "
                    "match this base weight; load it on the base model it was trained on, or save with save_basis=True"
                )
        super()._load_from_state_dict(state_dict, prefix, *args)


class FuraLinear(nn.Module, BaseTunerLayer):
    """A frozen `nn.Linear` with FuRA adapters on it."""

    adapter_layer_names: tuple[str, ...] = ("fura_core",)
    other_param_names: tuple[str, ...] = ()

    def __init__(self, base_layer: nn.Linear, adapter_name: str, config: FuraConfig, layer_name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.layer_name = layer_name
        self.fura_core = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._pristine_weight: torch.Tensor | None = None  # the base weight, set aside while adapters are merged
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: FuraConfig, inference_mode: bool = False) -> None:
        """Add an adapter: choose its blocks, compute its basis from the pristine base weight.

        Raises:
            ValueError: where the block size does not divide, or the base weight is not a finite float matrix.
        """
        block_size = resolve_block_size(config.block_size, self.in_features, self.out_features, self.layer_name)
        weight = self.pristine_weight()
        if weight.device.type == "meta":
            basis = empty_basis(weight, block_size)
        else:
            if not torch.isfinite(weight).all():
                raise ValueError(f"the base weight of {self.layer_name} has non-finite values; FuRA needs its SVD")
            basis = blocks.spectral_basis(weight, block_size)
        self.dropped_directions = basis.dropped
        core = FuraCore(basis, config.save_basis)
        if not config.init_weights and weight.device.type != "meta":
            core.randomize()
        self.fura_core[adapter_name] = core
        self._cast_core(core, config.core_dtype)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _cast_core(self, core: FuraCore, core_dtype: str | None) -> None:
        """The trained tensors in `core_dtype`, or PEFT's convention: the base dtype, which PEFT then makes float32."""
        dtype = getattr(torch, core_dtype) if core_dtype else self.get_base_layer().weight.dtype
        for parameter in core.parameters():
            parameter.data = parameter.data.to(dtype)

    def pristine_weight(self) -> torch.Tensor:
        """The base weight (out, in) without any adapter, also while adapters are merged."""
        return self.get_base_layer().weight.data if self._pristine_weight is None else self._pristine_weight

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """What the adapter adds to the base weight, (out, in), in the base weight's dtype."""
        weight = self.pristine_weight()
        return blocks.fold_delta(weight, self.fura_core[adapter_name].update()).to(weight.dtype)

    @torch.no_grad()
    def folded_weight(self, adapter_names: list[str]) -> torch.Tensor:
        """W + sum of W D over `adapter_names`, (out, in), from the pristine W, in float32 or wider, not rounded."""
        weight = self.pristine_weight()
        folded = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
        for name in adapter_names:
            if name in self.fura_core:
                folded += blocks.fold_delta(weight, self.fura_core[name].update()).to(folded.dtype)
        return folded

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put the folded weight in the base weight's place.  The pristine storage is set aside, never written.

        Raises:
            ValueError: with `safe_merge`, where the folded weight is not finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) or [] if name in self.fura_core]
        if not names:
            return
        pristine = self.pristine_weight()
        folded = self.folded_weight([*self.merged_adapters, *names]).to(pristine.dtype)
        if safe_merge and not torch.isfinite(folded).all():
            raise ValueError(f"NaNs detected in the merged weights. The adapter {names[0]} seems to be broken")
        self._pristine_weight = pristine
        self.get_base_layer().weight.data = folded
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put the pristine weight back: the same storage, so the same bits."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        weight = self.get_base_layer().weight
        weight.data = self._pristine_weight.to(device=weight.device, dtype=weight.dtype)
        self._pristine_weight = None
        self.merged_adapters.clear()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True  # get_delta_weight is additive

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if self.merged:
            return self.base_layer(x, *args, **kwargs)
        moved = x
        for name in self.active_adapters:
            if name in self.fura_core:
                moved = blocks.apply_update(x, self.fura_core[name].update(), onto=moved)
        return self.base_layer(moved, *args, **kwargs)

    def __repr__(self) -> str:
        return "fura." + super().__repr__()


def resolve_block_size(block_size: int | str, in_features: int, out_features: int, layer_name: str) -> int:
    """The block size of one layer in columns.

    Raises:
        ValueError: where an int does not divide `in_features`, naming the layer and the nearest sizes that do.
    """
    if block_size == "full":
        return in_features
    if block_size == "auto":
        size = blocks.default_block_size(in_features, out_features)
        if size in (1, in_features) and in_features > 3:
            warnings.warn(
                f"{layer_name}: in_features={in_features} has no factor pair near a square, so FuRA uses "
                f"{in_features // size} block(s) of {size} columns; give block_size to choose another",
                stacklevel=2,
            )
        return size
    if in_features % block_size:
        usable = sorted(sorted(blocks.divisors(in_features), key=lambda d: abs(d - block_size))[:3])
        raise ValueError(
            f"block_size={block_size} does not divide in_features={in_features} of {layer_name}; "
            f"use one of {', '.join(map(str, usable))}"
        )
    return block_size


def empty_basis(weight: torch.Tensor, block_size: int) -> blocks.SpectralBasis:
    """A basis of the right shapes for a weight that has no values yet (meta device); a checkpoint fills it."""
    out_features, in_features = weight.shape
    n, r = in_features // block_size, min(out_features, block_size)
    options = {"device": weight.device, "dtype": torch.promote_types(weight.dtype, torch.float32)}
    return blocks.SpectralBasis(torch.empty(n, block_size, r, **options), torch.empty(n, r, **options), dropped=0)
