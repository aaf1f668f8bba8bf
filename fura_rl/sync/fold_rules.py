"""The table of adapter methods and their small forms: what of an adapter a rollout engine needs to fold it itself.

A method without a line here, or an adapter that its line does not cover, is folded densely: PEFT merges it into a copy
of the weight.  A new method is one function and one line.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft.tuners.hira import HiraLayer
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.oft.layer import Linear as OFTLinear
from peft.tuners.oft.layer import OFTLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from fura_rl.adapters.fura_core import FuraCore, updates_together
from fura_rl.adapters.fura_layer import FuraLinear
from fura_rl.adapters.quantized import holds_packed_weight
from fura_rl.sync.factors import Factors, Span
from fura_rl.sync.sharding import by_rows, is_piece, whole, whole_shape


def fura_factors(layer: FuraLinear, names: list[str]) -> Factors | None:
    """D of the base form, relative to the base weight: no SVD and no sign convention leaves the trainer."""
    cores = [layer.fura_core[name] for name in names]
    if len({(core.form, core.axis, core.block_size) for core in cores}) > 1 or cores[0].form != "base":
        return None
    first, *others = (core.update_from(_float(core.delta_r), _float(core.delta_s)) for core in cores)
    return block_factors(layer, cores[0], sum(others, start=first))


def block_factors(layer: FuraLinear, core: FuraCore, update: torch.Tensor) -> Factors:
    columns_of_the_stored_weight = (core.axis == "in") != layer.is_conv1d
    return Factors("block_columns" if columns_of_the_stored_weight else "block_rows", {"update": update})


def lora_factors(layer: LoraLayer, names: list[str]) -> Factors | None:
    """up down = the sum of s B A over the active adapters; with a row scale for DoRA."""
    variants = [layer.lora_variant[name] for name in names if name in layer.lora_variant]
    dora = bool(variants) and all(isinstance(variant, DoraLinearVariant) for variant in variants)
    transposed = getattr(layer, "fan_in_fan_out", False)
    # an embedding's are elsewhere, and AdaLoRA's are no modules, and more than two
    plain = isinstance(layer.lora_A, nn.ModuleDict) and set(names) <= set(layer.lora_A)
    if not plain or transposed or (variants and (not dora or len(names) > 1)):
        return None
    if not dora:
        return Factors("low_rank", low_rank_product(layer, names))
    product: dict[str, torch.Tensor] = {}

    def norms(base: torch.Tensor, rows: Span) -> torch.Tensor:
        product.update(low_rank_product(layer, names))  # in here: a process that fails before it would gather nothing
        return torch.addmm(base.float(), product["up"][slice(*rows)], product["down"]).norm(dim=1)

    norm = by_rows(layer.get_base_layer().weight, norms)
    magnitude = _float(layer.lora_magnitude_vector[names[0]].weight)
    return Factors("scaled_low_rank", product | {"scale": magnitude / norm})


def low_rank_product(layer: LoraLayer, names: list[str]) -> dict[str, torch.Tensor]:
    """`up` (out, r) and `down` (r, in), whose product is the sum of s B A over the adapters `names`."""
    ups = [scaled(_float(layer.lora_B[name].weight), layer.scaling[name]) for name in names]
    downs = [_float(layer.lora_A[name].weight) for name in names]
    up, down = (ups[0], downs[0]) if len(names) == 1 else (torch.cat(ups, dim=1), torch.cat(downs))
    return {"up": up, "down": down}


def parameter_lora_factors(layer: ParamWrapper, names: list[str]) -> Factors | None:
    """LoRA of a bare parameter: of a matrix as of a layer's, of a stack of experts a product for each."""
    if len(whole_shape(layer.get_param())) == 2:
        return lora_factors(layer, names)
    found = [layer.get_delta_factors(name) for name in names]
    ups = [scaled(_float(up), scaling) for up, _, scaling in found]
    downs = [_float(down) for _, down, _ in found]
    return Factors("stacked_low_rank", {"up": torch.cat(ups, dim=2), "down": torch.cat(downs, dim=1)})


def scaled(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    return tensor if factor == 1 else factor * tensor


def hira_factors(layer: HiraLayer, names: list[str]) -> Factors | None:
    """W' = W + W * (B A); one adapter, since two multiply each other."""
    if len(names) > 1 or names[0] not in layer.hira_A or getattr(layer, "fan_in_fan_out", False):
        return None
    [name] = names
    return Factors("hadamard", {"up": _float(layer.hira_B[name]), "down": _float(layer.hira_A[name])})


def oft_factors(layer: OFTLayer, names: list[str]) -> Factors | None:
    """W' = W blockdiag(Q_i^T): D_i = Q_i^T - I, where Q turns the input by one adapter after another.

    Read off from what the adapters make of unit vectors, one of each block at once: their own (in, in) matrix would be
    gigabytes for a wide layer.
    """
    if not set(names) <= set(layer.oft_R):
        return None
    size = math.lcm(*(layer.oft_R[name].block_size for name in names))
    identity = torch.eye(size, device=layer.oft_R[names[0]].weight.device)
    turned = identity.repeat(1, layer.in_features // size)  # (b, in)
    for name in names:
        turned = layer.oft_R[name](turned)
    q = turned.unflatten(1, (-1, size)).transpose(0, 1)  # (n, b, b)
    return Factors("block_columns", {"update": q.mT - identity})


SMALL_FORMS: dict[type[BaseTunerLayer], Callable[[Any, list[str]], Factors | None]] = {
    FuraLinear: fura_factors,
    ParamWrapper: parameter_lora_factors,  # a LoraLayer, so it comes first
    LoraLayer: lora_factors,  # LoRA, rsLoRA, PiSSA, OLoRA, DoRA
    HiraLayer: hira_factors,
    OFTLayer: oft_factors,
}


@torch.no_grad()
def small_factors(layer: BaseTunerLayer) -> Factors | None:
    """The active adapters of one layer in a small form, or None where only the whole weight will do.

    Raises:
        RuntimeError: where the adapter is merged into its base weight, which is then no longer to be had.
    """
    form = next((form for kind, form in SMALL_FORMS.items() if isinstance(layer, kind)), None)
    names = [name for name in layer.active_adapters if name in layer._get_available_adapters()]
    if form is None or not names or holds_packed_weight(layer.get_base_layer()):
        return None
    if layer.merged and not isinstance(layer, FuraLinear):
        raise RuntimeError(
            f"{type(layer).__name__} is merged into its base weight; call unmerge_adapter() before a weight sync"
        )
    return form(layer, names)


def core_to_batch(layer: BaseTunerLayer) -> FuraCore | None:
    """The one active core of a layer, where its D can be made together with others of its `update_kind`; else None."""
    if not isinstance(layer, FuraLinear) or holds_packed_weight(layer.get_base_layer()):
        return None
    cores = [layer.fura_core[name] for name in layer.active_adapters if name in layer.fura_core]
    if len(cores) != 1 or cores[0].form != "base" or cores[0].update_kind is None or is_piece(cores[0].delta_r):
        return None
    return cores[0]


@torch.no_grad()
def small_factors_together(layers: Sequence[FuraLinear]) -> list[Factors]:
    """`small_factors` of layers that have a `core_to_batch` of one `update_kind`."""
    cores = [core_to_batch(layer) for layer in layers]
    made = zip(layers, cores, updates_together(cores), strict=True)
    return [block_factors(layer, core, update) for layer, core, update in made]


def may_move_its_bias(layer: BaseTunerLayer) -> bool:
    """Whether folding `layer` may change the bias too: IA3, RoAd and others scale or turn a layer's output as a whole.

    The methods of the table leave it alone (LoRA's own `lora_bias` is refused), and so does what can be added to a
    quantized weight.
    """
    return not isinstance(layer, tuple(SMALL_FORMS)) and not holds_packed_weight(layer.get_base_layer())


def merge_order(layer: BaseTunerLayer) -> list[str]:
    """The order in which merging the active adapters gives the weight of the layer's forward.

    OFT's forward turns the input by the first adapter first, and PEFT's merge turns the weight by it first, which is
    the other way round: of two adapters the merged layer is not the unmerged one.
    """
    return list(reversed(layer.active_adapters)) if isinstance(layer, OFTLinear) else list(layer.active_adapters)


def _float(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The whole tensor in float32 or wider."""
    return None if tensor is None else whole(tensor).to(torch.promote_types(tensor.dtype, torch.float32))
