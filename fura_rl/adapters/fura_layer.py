"""FuRA's layer, in its two forms; column blocks act on the input, row blocks on the output (before the bias).

    base form    y = W (x + D x)  or  y0 + D^T y0 with y0 = W x     W untouched; D is 0 and W exact at the start
    core form    y = L (C x)      or  C^T (L^T x)                   L in the place of W, dense or in 4 bits, or trained

The algebra is in blocks.py, one adapter's tensors in fura_core.py, how they are made in conversion.py.  Several active
adapters of the base form add up.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from torch import nn
from transformers.pytorch_utils import Conv1D

from fura_rl.adapters import blocks, frames
from fura_rl.adapters.conversion import (
    check_weight,
    empty_frame,
    is_offloaded,
    make_frame_where_there_is_room,
    parameters_go_to_meta,
    resolve_block_size,
    warn_of_lost_weight,
)
from fura_rl.adapters.fura_config import FuraConfig
from fura_rl.adapters.fura_core import FuraCore
from fura_rl.adapters.large_core import LargeCore
from fura_rl.adapters.moved_linear import moved_linear, spectral_linear, takes
from fura_rl.adapters.quantized import keep_layout
from fura_rl.adapters.set_aside import DenseWeight, QuantizedWeight, SetAsideCore
from fura_rl.finite import all_finite

TENSORS_OF_A_CORE = ("fura_core", "delta_r", "delta_s", "large_core", "basis_v", "basis_s")


class FuraLinear(nn.Module, BaseTunerLayer):
    """A frozen linear layer (`nn.Linear`, `Conv1D`, or one that PEFT can dequantize) with FuRA adapters on it."""

    adapter_layer_names: tuple[str, ...] = ("fura_core",)
    other_param_names: tuple[str, ...] = ()

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: FuraConfig, layer_name: str, **options: Any
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        keep_layout(base_layer)
        self.quantization_backend = resolve_quantization_backend(
            base_layer, get_apply_tensor_subclass=options.pop("get_apply_tensor_subclass", None)
        )
        self.in_features, self.out_features = _get_in_out_features(base_layer)
        self.is_conv1d = isinstance(base_layer, Conv1D)
        self.layer_name = layer_name
        self.fura_core = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self.dropped_directions = 0
        self.head_dim_fell_back = False
        self._disable_adapters = False
        self._set_aside: Any = None  # what stands in for the base weight while adapters are merged
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, **options)

    # ---- making an adapter

    def update_layer(
        self,
        adapter_name: str,
        config: FuraConfig,
        block_size: int | str | None = None,
        block_axis: str | None = None,
        head_dim: int | None = None,
        inference_mode: bool = False,
    ) -> None:
        """Add an adapter: choose its blocks, compute its frame from the pristine base weight.

        `block_size` and `block_axis` override the config's; `head_dim` is what block_size="head" stands for.

        Raises:
            ValueError: where the block size does not divide, the base weight is not a finite float matrix, the name is
                taken, or the core form would have to share the layer with another adapter.
        """
        self.check_room(adapter_name, config)
        self.dropped_directions, self.head_dim_fell_back = 0, False
        axis = block_axis or config.block_axis
        size = self._resolve_block_size(block_size or config.block_size, axis, head_dim)
        conversion_skipped = parameters_go_to_meta() and config.save_basis and config.form == "base"
        weight = self._pristine_meta_weight() if conversion_skipped else self.pristine_weight()
        oriented = self._orient(weight, axis)
        if weight.device.type == "meta":
            if is_offloaded(self.get_base_layer()) and not conversion_skipped:
                raise ValueError(
                    f"{self.layer_name} is offloaded, so its weight is not there to be decomposed; adapt the model, "
                    "or load its adapter, before it is offloaded"
                )
            frame, large = empty_frame(oriented, size, config)
        else:
            check_weight(weight, self.layer_name)
            frame, large = self._convert(oriented, size, config)
        core = FuraCore(frame, config, axis)
        if large is not None:
            self._store_large_core(core, large, axis, config)
        if not config.init_weights and core.basis_v.device.type != "meta" and not parameters_go_to_meta():
            core.randomize()
        self.fura_core[adapter_name] = core
        self._cast_core(core, config.core_dtype, weight.dtype)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def check_room(self, adapter_name: str, config: FuraConfig) -> None:
        if adapter_name in TENSORS_OF_A_CORE:
            raise ValueError(
                f"an adapter called {adapter_name!r} would be mixed up with FuRA's tensors in an adapter file; give it "
                f"a name other than {', '.join(TENSORS_OF_A_CORE)}"
            )
        if adapter_name in self.fura_core:
            raise ValueError(f"{self.layer_name} already carries an adapter called {adapter_name!r}; delete it first")
        if self.fura_core and (config.form == "core" or self.core_form is not None):
            raise ValueError(
                f"{self.layer_name}: an adapter in core form owns its layer, since the large core stands in the place "
                "of the base weight; use form='base' to have several adapters"
            )

    def _resolve_block_size(self, size: int | str, axis: str, head_dim: int | None) -> int:
        cut, other = (self.in_features, self.out_features) if axis == "in" else (self.out_features, self.in_features)
        if size == "head":
            if head_dim is None:
                raise ValueError(
                    f"block_size='head': the model's config gives no head dimension for {self.layer_name}; "
                    "give the size as an int"
                )
            self.head_dim_fell_back = bool(cut % head_dim)
            size = "auto" if self.head_dim_fell_back else head_dim
        return resolve_block_size(size, cut, other, f"{axis}_features", self.layer_name)

    @torch.no_grad()
    def _convert(
        self, oriented: torch.Tensor, size: int, config: FuraConfig
    ) -> tuple[frames.Frame, torch.Tensor | None]:
        """`make_frame` of the weight, where it lies and in its dtype; says what the frame does not hold."""
        home, dtype = oriented.device, oriented.dtype
        frame, large = make_frame_where_there_is_room(oriented, size, config)
        if config.basis == "random":
            warn_of_lost_weight(oriented, blocks.fold(large, frame.right.mT).to(home), self.layer_name)
        self.dropped_directions = frame.dropped
        if large is not None:
            large = large.to(home, dtype if config.train_core == "small" else None)  # one that trains stays wide
        return frame.to(home), large

    def _store_large_core(self, core: FuraCore, large: torch.Tensor, axis: str, config: FuraConfig) -> None:
        stored = (large if axis == "in" else large.mT).contiguous()
        if config.train_core == "small":
            bias = getattr(self.base_layer, "bias", None)
            self.base_layer = LargeCore(stored, bias, config.quantize_core)
            self.quantization_backend = None
        else:  # the base weight stays: a trained core has gradients and Adam states of its size, so it is little more
            core.large_core = nn.Parameter(stored.to(torch.promote_types(stored.dtype, torch.float32)))

    def _cast_core(self, core: FuraCore, core_dtype: str | None, base_dtype: torch.dtype) -> None:
        """The trained tensors in `core_dtype`, or PEFT's convention: the base dtype, which PEFT then makes float32.

        A large core, which does not start at 0, would be rounded on the way: the tuner casts it where PEFT does not.
        """
        for parameter in core.parameters():
            if core_dtype:
                parameter.data = parameter.data.to(getattr(torch, core_dtype))
            elif parameter is not core.large_core:
                parameter.data = parameter.data.to(base_dtype)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """To the device only: PEFT's cast to the base dtype would round what it makes float32 again afterwards."""
        home = device or self.get_base_layer().weight.device
        held = all(p.device.type != "meta" for p in self.fura_core.parameters())
        if adapter_name in self.fura_core and held and home.type != "meta":
            self.fura_core[adapter_name].to(home)

    # ---- weights

    @property
    def core_form(self) -> FuraCore | None:
        """The adapter in core form that owns this layer, None where its adapters are in base form."""
        return next((core for core in self.fura_core.values() if core.form == "core"), None)

    @property
    def owns_large_core(self) -> bool:
        """Whether the base weight is gone and a frozen large core stands in its place."""
        core = self.core_form
        return core is not None and core.large_core is None

    @property
    def base_dtype(self) -> torch.dtype:
        """Of the base weight; where 4 or 8 bits stand for it, of what they dequantize to."""
        if self.owns_large_core:
            return self._large_layer().compute_dtype
        dtype = self.get_base_layer().weight.dtype
        return dtype if dtype.is_floating_point else self.pristine_weight().dtype

    def _orient(self, weight: torch.Tensor, axis: str) -> torch.Tensor:
        """The weight as stored, turned so that blocks are columns; its own inverse."""
        return weight.mT if (axis == "out") != self.is_conv1d else weight

    def _pristine_meta_weight(self) -> torch.Tensor:
        shape = (self.in_features, self.out_features) if self.is_conv1d else (self.out_features, self.in_features)
        dtype = self.get_base_layer().weight.dtype
        return torch.empty(shape, device="meta", dtype=dtype if dtype.is_floating_point else torch.float32)

    @torch.no_grad()
    def pristine_weight(self) -> torch.Tensor:
        """The base weight as its layer stores it, without any adapter, also while adapters are merged.

        Dequantized where it is quantized; multiplied out from the frozen cores where the core form has replaced it.
        """
        if self.owns_large_core:
            return self._unfold(self.core_form, adapted=False).to(self.base_dtype)
        return self.get_base_weight() if self._set_aside is None else self._set_aside.dequantized

    def _large_layer(self) -> LargeCore:
        return self.base_layer if self._set_aside is None else self._set_aside.core

    def _unfold(self, core: FuraCore, adapted: bool = True) -> torch.Tensor:
        """L C of a core form, laid out as the base weight is stored, in float32 or wider."""
        stored = self._large_layer().dense() if core.large_core is None else core.large_core.data
        large = stored if core.axis == "in" else stored.mT
        return self._orient(blocks.fold(large, core.core(adapted)), core.axis)

    def _fold_delta(self, core: FuraCore, weight: torch.Tensor) -> torch.Tensor:
        """What one adapter adds to `weight`, as stored, in float32 or wider."""
        if core.form == "core":
            start = self._unfold(core, adapted=False) if core.large_core is None else weight
            return self._unfold(core) - start
        return self._orient(blocks.fold(self._orient(weight, core.axis), core.update()), core.axis)

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """What the adapter adds to the base weight, as stored, in the base weight's dtype."""
        weight = self.pristine_weight()
        return self._fold_delta(self.fura_core[adapter_name], weight).to(weight.dtype)

    @torch.no_grad()
    def folded_weight(self, adapter_names: list[str]) -> torch.Tensor:
        """The weight with `adapter_names` in it, as stored, from the pristine one, in float32 or wider, not rounded."""
        cores = [self.fura_core[name] for name in adapter_names if name in self.fura_core]
        if self.core_form is not None and cores:
            return self._unfold(cores[0])
        weight = self.pristine_weight()
        folded = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
        for core in cores:
            folded += self._fold_delta(core, weight)
        return folded

    # ---- merging: the folded weight takes the base weight's place, which is set aside and never written

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put the folded weight in the base weight's place; a quantized base is quantized again, as PEFT does.

        Raises:
            ValueError: with `safe_merge`, where the folded weight is not finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) or [] if name in self.fura_core]
        if not names:
            return
        dtype = self.pristine_weight().dtype
        folded = self.folded_weight([*self.merged_adapters, *names]).to(dtype)
        if safe_merge and not all_finite([folded]):
            raise ValueError(f"NaNs detected in the merged weights. The adapter {names[0]} seems to be broken")
        self._put(folded)
        self.merged_adapters.extend(names)

    def _put(self, folded: torch.Tensor) -> None:
        if self.owns_large_core:
            self._set_aside = SetAsideCore(self._large_layer())
            self.base_layer = self._dense_layer(folded)
        elif self.quantization_backend is not None:
            if self._set_aside is None:
                self._set_aside = QuantizedWeight(self)
            self.set_base_weight(folded)
        else:
            if self._set_aside is None:
                self._set_aside = DenseWeight(self)
            self.get_base_layer().weight = nn.Parameter(folded, requires_grad=False)

    def unmerge(self) -> None:
        """Put the pristine weight back: the same storage, so the same bits."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        if self.owns_large_core:
            self.base_layer = self._set_aside.core.to(self.base_layer.weight)  # moved and cast with the model
        else:
            self._set_aside.restore(self.get_base_layer())
        self._set_aside = None
        self.merged_adapters.clear()

    def _dense_layer(self, weight: torch.Tensor) -> nn.Module:
        """A plain layer of the base layer's kind around `weight` (as stored) and the base layer's bias."""
        bias = self._large_layer().bias
        options = {"device": "meta", "dtype": weight.dtype}
        if self.is_conv1d:
            with torch.device("meta"):
                layer = Conv1D(self.out_features, self.in_features)
        else:
            layer = nn.Linear(self.in_features, self.out_features, bias=bias is not None, **options)
        layer.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        layer.bias = bias
        return layer

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """PEFT's hook for `merge_and_unload` and `unload`; a core form gives its linear layer back."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        if self.owns_large_core and not self.merged:
            self._put(self.pristine_weight())  # PEFT takes the tensors of what is now the base layer
        return self.get_base_layer()

    def delete_adapter(self, adapter_name: str) -> None:
        """A core form that goes leaves a dense linear layer behind, as `unload` does: L alone is not the base map."""
        if self.owns_large_core and adapter_name in self.fura_core:
            self._put(self.pristine_weight())
            self._set_aside = None
        super().delete_adapter(adapter_name)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Not where the update adds to another weight than the base model's, or PEFT would mistake its layout."""
        if adapter_name in self.fura_core and self.fura_core[adapter_name].basis == "random":
            warnings.warn(
                f"{self.layer_name}: basis='random' trains from a projection of the base weight, so on the base weight "
                "itself its update as a LoRA would be another model; merge_and_unload() it, or train with basis='svd'",
                stacklevel=2,
            )
            return False
        if self.is_conv1d and self.owns_large_core:
            warnings.warn(
                f"{self.layer_name}: PEFT cannot convert the core form of a Conv1D to LoRA, since the Conv1D is gone; "
                "train it in form='base', or merge_and_unload() it",
                stacklevel=2,
            )
            return False
        return True

    # ---- forward

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.merged:
            return self.base_layer(x, *args, **kwargs)
        held, owner = self.fura_core, self.core_form
        cores = [] if self.disable_adapters else [held[name] for name in self.active_adapters if name in held]
        if owner is not None and (cores or owner.large_core is None):  # `owns_large_core`, whose look-ups are dear here
            return self._core_forward(x, owner, adapted=bool(cores))
        if not cores:
            return self.base_layer(x, *args, **kwargs)
        return self._base_forward(as_autocast(x), cores, *args, **kwargs)

    def _base_forward(self, x: torch.Tensor, cores: list[FuraCore], *args: Any, **kwargs: Any) -> torch.Tensor:
        base_layer = self.base_layer
        dense = not (args or kwargs) and takes(base_layer, x)
        if dense and len(cores) == 1 and cores[0].axis == "in" and (tensors := cores[0].spectral_tensors()):
            return spectral_linear(x, *tensors, base_layer)
        column_updates, row_updates = (
            sum_updates([core for core in cores if core.axis == axis]) for axis in ("in", "out")
        )
        if dense and len(column_updates) == 1 and not row_updates:
            return moved_linear(x, column_updates[0], base_layer)
        moved = None
        for update in column_updates:
            moved = blocks.add_update(x, update, onto=moved)
        y = base_layer(x if moved is None else moved, *args, **kwargs)
        if row_updates:
            plain = y if moved is None else base_layer(x, *args, **kwargs)
            bias = self.get_base_layer().bias
            product = plain if bias is None else plain - bias.to(plain.dtype)  # W x
            for update in row_updates:
                y = blocks.add_update(product, update.mT, onto=None if y is product else y)
        return y

    def _core_forward(self, x: torch.Tensor, core: FuraCore, adapted: bool) -> torch.Tensor:
        dtype = x.dtype
        x = as_autocast(x)
        small = core.core(adapted)
        if core.large_core is None:
            large = self.base_layer
        else:
            weight = core.large_core.to(x.dtype)

            def large(z: torch.Tensor) -> torch.Tensor:
                return nn.functional.linear(z, weight)

        y = large(blocks.apply_core(x, small)) if core.axis == "in" else blocks.apply_core(large(x), small.mT)
        bias = self.get_base_layer().bias
        y = y if bias is None else y + bias.to(y.dtype)
        return y if torch.is_autocast_enabled(x.device.type) else y.to(dtype)

    # ---- loading

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        """A core form whose saved basis differs from the one computed here (another machine) gets its L re-expressed.

        L_i C0_i is the base weight's block in both, so the saved frame's L is the one that this machine's weight gives.
        """
        for name, core in self.fura_core.items():
            saved = state_dict.get(f"{prefix}fura_core.{name}.basis_v")
            if not self.owns_large_core or saved is None or core.basis_v.device.type == "meta":
                continue  # an empty layer takes the large core that was saved with the basis
            if f"{prefix}base_layer.weight" in state_dict:
                continue  # so does one that a whole model's state is loaded into, whatever its own base weight
            if torch.equal(saved.to(core.basis_v), core.basis_v):
                continue
            saved = saved.to(core.basis_v)
            if core.basis_s is None:
                if not torch.allclose(saved, core.basis_v, rtol=1e-2, atol=1e-3 * float(saved.abs().max())):
                    args[-1].append(f"{prefix}fura_core.{name}: the saved cores do not belong to this base weight")
                continue
            values = state_dict[f"{prefix}fura_core.{name}.basis_s"].to(core.basis_s)
            weight = self._orient(self._unfold(core, adapted=False), core.axis)
            large = blocks.large_core(weight, saved, blocks.core_scale(values, core.treatment, core.train_core))
            self._large_layer().replace((large if core.axis == "in" else large.mT).contiguous())
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)

    def __repr__(self) -> str:
        return "fura." + super().__repr__()


def as_autocast(x: torch.Tensor) -> torch.Tensor:
    """x as autocast would hand it to a linear layer, which is what our products before that layer take."""
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type) and x.dtype != torch.float64:  # which autocast leaves alone
        return x.to(torch.get_autocast_dtype(device_type))
    return x


def sum_updates(cores: list[FuraCore]) -> list[torch.Tensor]:
    """The block updates of `cores`, those of equal block size added up: (n, b, b) each."""
    by_size: dict[int, torch.Tensor] = {}
    for core in cores:
        update = core.update()
        by_size[core.block_size] = by_size[core.block_size] + update if core.block_size in by_size else update
    return list(by_size.values())
