"""The policy's weights as a rollout engine wants them: checkpoint tensors, and what each adapter does to them.

Everything is read or computed out of place: a base weight keeps its storage and its bits.  Nothing here knows how a
weight reaches an engine.  `fold_rules.py` is the table of methods, `factors.py` the arithmetic.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from fura_rl.adapters.fura_layer import FuraLinear
from fura_rl.adapters.quantized import dequantized_weight, holds_packed_weight
from fura_rl.sync.factors import Factors, Read, Span, as_matrix, cut_to_rows, fold_slice, matrix_shape, row_index
from fura_rl.sync.fold_rules import may_move_its_bias, merge_order, small_factors
from fura_rl.sync.sharding import gathered, is_piece, local, local_rows, whole, whole_shape


@dataclass(frozen=True)
class CheckpointWeight:
    """One tensor of the policy, e.g. `model.layers.0.self_attn.q_proj.weight`.

    `name` is the policy's own, or, for an engine, that in the checkpoint; `own_name` is then the policy's.
    `parts` are the matrices of each expert that the checkpoint has in the place of a stack (`stacks.Stacks`);
    `held_otherwise`: it has something else in its place, so that an engine cannot read the base value.
    `layer` is the adapter layer that changes it, or None; `trained` says whether training moves its value (folded, or a
    parameter that takes gradients).  `quantized` is the bare quantized layer it belongs to, or None: its value never
    moves, but it is not the 16-bit checkpoint's either.
    """

    name: str
    parameter: nn.Parameter
    layer: BaseTunerLayer | None = None
    quantized: nn.Module | None = None
    own_name: str | None = None
    parts: tuple[str, ...] = ()
    held_otherwise: bool = False

    @property
    def trained(self) -> bool:
        return self.layer is not None or self.parameter.requires_grad

    @property
    def is_bias(self) -> bool:
        return self.name.endswith(".bias")

    @property
    def module_name(self) -> str:
        """The policy's own name of the module that it is in."""
        return (self.own_name or self.name).rpartition(".")[0]

    @property
    def parameter_name(self) -> str:
        return (self.own_name or self.name).rpartition(".")[2]

    @functools.cached_property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape in the checkpoint."""
        if isinstance(self.layer, FuraLinear):
            shape = (self.layer.out_features, self.layer.in_features)
            return shape[::-1] if self.layer.is_conv1d else shape  # a large core is not laid out as its weight was
        if self.quantized is not None or (self.layer is not None and holds_packed_weight(self.layer.get_base_layer())):
            holder = self.quantized if self.quantized is not None else self.layer.get_base_layer()
            return (holder.out_features, holder.in_features)
        return whole_shape(self.parameter)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Its rows and columns: of a stack of experts the rows of one after another, of a vector one column."""
        return matrix_shape(self.shape)

    @property
    def holds_the_checkpoints(self) -> bool:
        """Whether its base value is the checkpoint's: neither trained itself, nor quantized, nor rounded to a core."""
        if self.parameter.requires_grad:  # a bias, too, that is trained beside the adapter on its layer
            return False
        if self.layer is None:
            return self.quantized is None
        in_core = isinstance(self.layer, FuraLinear) and self.layer.owns_large_core
        return not in_core and not holds_packed_weight(self.layer.get_base_layer())

    @property
    def element_count(self) -> int:
        return math.prod(self.shape)

    def factors(self) -> Factors:
        """What the engine's copy of the base weight needs to become this tensor; dense where nothing smaller does."""
        if self.layer is not None and self.quantized is None and not self.held_otherwise:
            with gathered(self.layer, but=self.layer.get_base_layer()):
                small = small_factors(self.layer)
            if small is not None:
                return small
        return self.dense_factors()

    def dense_factors(self) -> Factors:
        return Factors("dense", {"weight": as_matrix(self.value())})

    def read(self) -> Read:
        """Slices of the pristine base value, without a copy where it is neither quantized nor sharded."""
        return BaseSlices(as_matrix(whole(pristine_weight(self))))

    @property
    def local_rows(self) -> Span:
        """The rows of its matrix that this process holds; none of a weight whose large core is in pieces."""
        if not is_piece(self.parameter):
            return 0, self.matrix_shape[0]
        if isinstance(self.layer, FuraLinear) and self.layer.owns_large_core:
            return 0, 0
        first, last = local_rows(pristine_weight(self))
        each = math.prod(self.shape[1:-1])
        return first * each, last * each

    def read_local(self) -> BaseSlices:
        """Slices of the pristine base value within `local_rows`, gathered from nobody."""
        return BaseSlices(as_matrix(local(pristine_weight(self))), self.local_rows[0])

    def local_value(self) -> torch.Tensor:
        """The `local_rows` of the tensor to serve, in float32 or wider where they are folded.  Collective for a sharded
        adapter; of the base value nothing is gathered, unless the adapter has no small form."""
        if self.layer is None and self.quantized is None:
            return as_matrix(local(self.parameter))
        rows, factors, read = self.local_rows, self.factors(), self.read_local()
        if factors.rule == "dense":
            return factors.tensors["weight"][slice(*rows)]
        dtype = torch.promote_types(read.base.dtype, torch.float32)
        folded = torch.empty(rows[1] - rows[0], self.matrix_shape[1], dtype=dtype, device=read.base.device)
        fold_slice(read, factors, rows, (0, self.matrix_shape[1]), folded)
        return folded

    def trained_parameters(self) -> list[nn.Parameter]:
        """The parameters with gradients that its value is made of."""
        parameters = [self.parameter] if self.layer is None else self.layer.parameters()
        return [p for p in parameters if p.requires_grad]

    def value(self) -> torch.Tensor:
        """The tensor to serve; in float32 or wider where it is folded, dequantized where its layer is quantized."""
        if self.quantized is not None:
            return dequantized_weight(self.quantized)
        if self.layer is None:
            return whole(self.parameter)
        with gathered(self.layer):
            return folded_bias(self.layer) if self.is_bias else folded_weight(self.layer)


@dataclass(frozen=True)
class BaseSlices:
    """Reads slices of `base`, a matrix or vector whose first row is row `first_row` of the weight: a `factors.Read`.

    `start` is what brings `base` to the checkpoint's value, where making the adapter moved it away.
    """

    base: torch.Tensor
    first_row: int = 0
    start: Factors | None = None

    def __call__(self, rows: Span, columns: Span) -> torch.Tensor:
        if self.start is None:
            part = self.base[rows[0] - self.first_row : rows[1] - self.first_row]
            return part[:, slice(*columns)] if self.base.ndim == 2 else part
        return self._started(replace(self, start=None), self.start, rows, columns)

    def rows(self, spans: tuple[Span, ...]) -> torch.Tensor:
        """Those of all columns, one span after another, as a copy."""
        here = tuple((first - self.first_row, last - self.first_row) for first, last in spans)
        picked, columns = self.base[row_index(here, self.base.device)], self.base.shape[1]
        if self.start is None:
            return picked
        cut = cut_to_rows(self, self.start, spans, columns)
        return self._started(lambda *_: picked, cut, (0, len(picked)), (0, columns))

    @staticmethod
    def _started(read: Read, start: Factors, rows: Span, columns: Span) -> torch.Tensor:
        out = torch.empty(rows[1] - rows[0], columns[1] - columns[0], device=start.tensors["up"].device)
        fold_slice(read, start, rows, columns, out)
        return out


def checkpoint_weights(model: nn.Module) -> list[CheckpointWeight]:
    """Every parameter of the underlying model in module order under its own name, tied ones once, adapters folded into
    their owner.

    `model` is a plain or a PEFT model.

    Raises:
        NotImplementedError: for an adapter that does not sit on one layer alone, or changes one name only of a tied
            weight.
    """
    base_model = model.get_base_model() if hasattr(model, "get_base_model") else model
    named = {weight.name: weight for weight in _walk(base_model, "")}
    weights: dict[int, CheckpointWeight] = {}
    for weight in named.values():
        _refuse_unlike_adapters(weights.setdefault(id(weight.parameter), weight), weight)
    # an adapter that puts a weight of its own in the place of the tied one has left only the model's record of the tie
    for name, source in (getattr(base_model, "all_tied_weights_keys", None) or {}).items():
        if name in named and source in named:
            _refuse_unlike_adapters(named[source], named[name])
            _refuse_what_is_trained_apart(named[source], named[name])
    return list(weights.values())


def check_folds(model: nn.Module) -> None:
    """Fold one weight of every kind of adapter layer, to see before an engine is started that its method can.

    Raises:
        NotImplementedError: naming the weight and the reason.
    """
    adapted = [weight for weight in checkpoint_weights(model) if weight.layer is not None]
    for weight in {(type(weight.layer), weight.is_bias): weight for weight in reversed(adapted)}.values():
        try:
            weight.factors()
        except Exception as error:
            raise NotImplementedError(
                f"{weight.name}: {type(weight.layer).__module__}.{type(weight.layer).__name__} cannot be folded: "
                f"{error}. The rollout engine serves folded weights: take an adapter that PEFT can merge into it"
            ) from error


def _refuse_unlike_adapters(first: CheckpointWeight, second: CheckpointWeight) -> None:
    """Raises NotImplementedError where two names of one weight, which an engine holds once, are not folded alike."""
    if first.layer is second.layer or adapter_storages(first.layer) == adapter_storages(second.layer):
        return
    adapted = [weight.module_name for weight in (first, second) if weight.layer is not None]
    raise NotImplementedError(
        f"target_modules put an adapter on {' and another on '.join(adapted)}, but tie_word_embeddings makes "
        f"{first.name} and {second.name} one tensor, which the engine holds once: it would not compute what the policy "
        f"computes. Leave {' and '.join(name.rpartition('.')[2] for name in adapted)} out of target_modules, or, for "
        "LoRA, adapt both alike with ensure_weight_tying=True"
    )


def _refuse_what_is_trained_apart(first: CheckpointWeight, second: CheckpointWeight) -> None:
    """Raises NotImplementedError where modules_to_save has made two tensors of a weight that an engine holds once."""
    apart = local(first.parameter).data_ptr() != local(second.parameter).data_ptr()
    if first.layer is None and apart and (first.trained or second.trained):
        trained = " and ".join(weight.module_name for weight in (first, second) if weight.trained)
        raise NotImplementedError(
            f"modules_to_save trains {trained} apart, but tie_word_embeddings makes {first.name} and {second.name} one "
            "tensor, which the engine holds once: it would not compute what the policy computes. Leave "
            f"{trained} out of modules_to_save, or, for LoRA, keep them one with ensure_weight_tying=True"
        )


def adapter_storages(layer: BaseTunerLayer | None) -> set[int]:
    """Where the numbers of a layer's adapters lie: PEFT ties two adapters by views of the same storage."""
    if layer is None:
        return set()
    base = set(layer.get_base_layer().parameters())
    return {local(parameter).data_ptr() for parameter in layer.parameters() if parameter not in base}


def _walk(module: nn.Module, prefix: str) -> Iterator[CheckpointWeight]:
    if isinstance(module, ParamWrapper):
        wrappers = {wrapper.parameter_name: wrapper for wrapper in _nested_wrappers(module)}
        for name, parameter in module.get_base_layer().named_parameters(recurse=False):
            yield CheckpointWeight(f"{prefix}.{name}", parameter, wrappers.get(name))
    elif isinstance(module, BaseTunerLayer):
        base_layer = module.get_base_layer()
        _refuse_what_no_fold_serves(module, prefix)
        folded = ("weight", "bias") if may_move_its_bias(module) else ("weight",)
        for name, parameter in base_layer.named_parameters(recurse=False):
            yield CheckpointWeight(f"{prefix}.{name}", parameter, module if name in folded else None)
    elif isinstance(module, ModulesToSaveWrapper):
        yield from _walk(module.modules_to_save[module.active_adapters[0]], prefix)
    elif isinstance(module, AuxiliaryTrainingWrapper):
        raise NotImplementedError(f"{prefix}: the weight sync cannot fold a {type(module).__name__}")
    else:
        packed = module if holds_packed_weight(module) else None
        for name, parameter in module.named_parameters(recurse=False):
            quantized = packed if name == "weight" else None
            yield CheckpointWeight(f"{prefix}.{name}".lstrip("."), parameter, quantized=quantized)
        for name, child in module.named_children():
            yield from _walk(child, f"{prefix}.{name}".lstrip("."))


def _refuse_what_no_fold_serves(layer: BaseTunerLayer, name: str) -> None:
    """Raises NotImplementedError for an adapter that does not sit on one layer with a weight, or adds a bias to it."""
    weight = getattr(layer.get_base_layer(), "weight", None)
    if not isinstance(weight, nn.Parameter) or hasattr(layer, "parameter_name"):
        raise NotImplementedError(
            f"{name}: {type(layer).__name__} adapts something other than the weight of one layer; the weight "
            "sync cannot fold it. Use target_modules that name linear layers"
        )
    if any(getattr(layer, "lora_bias", {}).get(adapter) for adapter in layer.active_adapters):
        raise NotImplementedError(
            f"{name}: lora_bias=True trains a bias of the adapter's own, which the weight sync does not fold; set it "
            "to false, or train the layers' own biases with bias='lora_only'"
        )


def _nested_wrappers(module: nn.Module) -> Iterator[ParamWrapper]:
    """PEFT's adapters of the parameters of one module (stacked experts) wrap each other."""
    while isinstance(module, ParamWrapper):
        yield module
        module = module.base_layer


@torch.no_grad()
def fold(base_weight: torch.Tensor, layer: BaseTunerLayer) -> torch.Tensor:
    """The weight that `layer`, a PEFT layer of any method that can merge, makes of `base_weight`.

    Pure and out of place, in float32 or wider.  `base_weight` is as the layer stores it; a layer's own base
    weight need not be at hand unless its method has no small form (`fold_rules.SMALL_FORMS`).
    """
    factors = small_factors(layer)
    if factors is None:
        return folded_weight(layer, base_weight)
    folded = torch.empty(
        base_weight.shape, dtype=torch.promote_types(base_weight.dtype, torch.float32), device=base_weight.device
    )
    rows, columns = ((0, size) for size in matrix_shape(base_weight.shape))
    fold_slice(BaseSlices(as_matrix(base_weight)), factors, rows, columns, as_matrix(folded))
    return folded


@torch.no_grad()
def folded_weight(layer: BaseTunerLayer, base_weight: torch.Tensor | None = None) -> torch.Tensor:
    """The weight that makes the bare layer compute what `layer` computes with its active adapters.

    As stored, in float32 or wider, so that the one rounding is the engine's.  The base layer is not written: FuRA folds
    in closed form, any other PEFT method merges into a float32 copy that takes the weight's place meanwhile
    (`base_weight` in its stead, where given).

    Raises:
        RuntimeError: where the adapter is merged already, since its base weight is then no longer to be had.
    """
    if isinstance(layer, FuraLinear):
        return layer.folded_weight(layer.active_adapters)
    if isinstance(layer, ParamWrapper):
        start = whole(layer.get_param() if base_weight is None else base_weight).float()
        return sum((layer.get_delta_weight(name).float() for name in layer.active_adapters), start=start)
    if layer.merged:
        raise RuntimeError(
            f"{type(layer).__name__} is merged into its base weight; call unmerge_adapter() before a weight sync"
        )
    if holds_packed_weight(layer.get_base_layer()):
        return _folded_over_packed(layer)
    return _merged(layer, base_weight)["weight"]


@torch.no_grad()
def folded_bias(layer: BaseTunerLayer) -> torch.Tensor:
    """`folded_weight` for the bias, which some methods move as well (`fold_rules.may_move_its_bias`)."""
    return _merged(layer)["bias"]


def _merged(layer: BaseTunerLayer, base_weight: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """What the base layer's parameters are once `layer` is merged into copies of them, in float32 or wider.

    Read from the layer that stands there then: LN tuning puts another one in the base layer's place.
    """
    weight = layer.get_base_layer().weight
    pristine = {parameter: parameter.data for parameter in layer.get_base_layer().parameters(recurse=False)}
    try:
        for parameter, data in pristine.items():
            start = base_weight if parameter is weight and base_weight is not None else data
            parameter.data = wide_copy(whole(start))
        layer.merge(adapter_names=merge_order(layer))
        merged = {name: wide_copy(p) for name, p in layer.get_base_layer().named_parameters(recurse=False)}
        if layer.merged:
            layer.unmerge()  # for the method's own book-keeping only; the copies it works on are thrown away
    finally:
        for parameter, data in pristine.items():
            parameter.data = data
        layer.merged_adapters.clear()
    return merged


def wide_copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32), copy=True)


def _folded_over_packed(layer: BaseTunerLayer) -> torch.Tensor:
    """Dequantized weight plus the active adapters' deltas: no second quantization, unlike PEFT's own merge."""
    active = [name for name in layer.active_adapters if name in layer._get_available_adapters()]
    variants = [layer.lora_variant[name] for name in active if name in getattr(layer, "lora_variant", ())]
    if len(active) == 1 and len(variants) == 1 and isinstance(variants[0], DoraLinearVariant):
        return _folded_dora_over_packed(layer, active[0])
    if variants or not all(hasattr(layer, "lora_variant") or layer.supports_lora_conversion(name) for name in active):
        raise NotImplementedError(
            f"{type(layer).__name__}: an adapter that is not a plain addition to its weight cannot be folded over a "
            "quantized base; use fura, lora or dora, or an unquantized base"
        )
    folded = dequantized_weight(layer.get_base_layer()).float()
    return sum((layer.get_delta_weight(name).float() for name in active), start=folded)


def _folded_dora_over_packed(layer: BaseTunerLayer, name: str) -> torch.Tensor:
    """diag(m / ||W + s B A||) (W + s B A) for W dequantized, norms by row: DoRA as its forward computes it."""
    directed = dequantized_weight(layer.get_base_layer()).float() + layer.get_delta_weight(name).float()
    magnitude = whole(layer.lora_magnitude_vector[name].weight).float()
    return (magnitude / directed.norm(dim=1))[:, None] * directed


def pristine_weight(weight: CheckpointWeight) -> torch.Tensor:
    """The base value of `weight`, whether or not a FuRA adapter is merged at the moment."""
    if isinstance(weight.layer, FuraLinear):
        return weight.layer.pristine_weight()
    if weight.quantized is not None:
        return dequantized_weight(weight.quantized)
    if weight.layer is not None and holds_packed_weight(weight.layer.get_base_layer()):
        return dequantized_weight(weight.layer.get_base_layer())
    return weight.parameter
