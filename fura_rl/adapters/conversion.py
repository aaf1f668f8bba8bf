"""Making an adapter of one layer: its block size, the frame of its weight and where that is computed.

The decompositions themselves are in frames.py.
"""

from __future__ import annotations

import warnings

import torch
from torch import nn

from fura_rl.adapters import blocks, frames
from fura_rl.adapters.fura_config import FuraConfig
from fura_rl.finite import all_finite


def make_frame_where_there_is_room(
    weight: torch.Tensor, size: int, config: FuraConfig
) -> tuple[frames.Frame, torch.Tensor | None]:
    """`make_frame` on the conversion device or, where others have filled that, where the weight lies."""
    device = conversion_device(weight.device)
    if device != weight.device:
        try:
            return make_frame(weight.to(device), size, config)
        except torch.OutOfMemoryError:
            warnings.warn(
                f"{device} has no room to decompose a layer of shape {tuple(weight.shape)} (does a rollout server fill "
                f"it?); it is decomposed on {weight.device} instead, which takes longer",
                stacklevel=2,
            )
    return make_frame(weight, size, config)


def make_frame(weight: torch.Tensor, size: int, config: FuraConfig) -> tuple[frames.Frame, torch.Tensor | None]:
    """The frame of `weight` (rows, cols) and, for a core form, the large core (rows, n * r)."""
    if config.basis == "svd":
        frame = frames.svd_frame(weight, size)
        if config.form == "base":
            return frame, None
        scale = blocks.core_scale(frame.singular_values, config.singular_values, config.train_core)
        return frame, blocks.large_core(weight, frame.right, scale)
    if config.basis == "random":
        large, small = frames.random_cores(weight, size, seed=weight.numel())
        return frames.Frame(small.mT, None), large
    large, small = frames.qr_cores(weight, size)
    singular_values = torch.linalg.svdvals(small.double())
    dropped = int((singular_values <= frames.RANK_TOLERANCE * singular_values[:, :1]).sum())
    if config.form == "core":
        return frames.Frame(small.mT, None, dropped), large
    inverse = torch.linalg.pinv(small.double(), rtol=frames.RANK_TOLERANCE).to(small.dtype)
    return frames.Frame(inverse, None, dropped), None


def empty_frame(weight: torch.Tensor, size: int, config: FuraConfig) -> tuple[frames.Frame, torch.Tensor | None]:
    """As `make_frame`, of the right shapes for a weight without values (meta device); a checkpoint fills them."""
    rows, cols = weight.shape
    n, r = cols // size, min(rows, size)
    options = {"device": "meta", "dtype": torch.promote_types(weight.dtype, torch.float32)}
    values = torch.empty(n, r, **options) if config.basis == "svd" else None
    large = weight.new_empty(rows, n * r) if config.form == "core" else None
    return frames.Frame(torch.empty(n, size, r, **options), values), large


def parameters_go_to_meta() -> bool:
    """Whether modules made now get their parameters on the meta device (PEFT's `low_cpu_mem_usage`)."""
    probe = nn.Module()
    probe.register_parameter("probe", nn.Parameter(torch.empty(0)))
    return probe.probe.device.type == "meta"


def conversion_device(home: torch.device) -> torch.device:
    """Where a layer is decomposed: on the GPU where there is one, one layer at a time."""
    return torch.device("cuda") if home.type == "cpu" and torch.cuda.is_available() else home


def is_offloaded(layer: nn.Module) -> bool:
    """Whether accelerate keeps this layer's weights elsewhere between its forwards."""
    return bool(getattr(getattr(layer, "_hf_hook", None), "offload", False))


def check_weight(weight: torch.Tensor, layer_name: str) -> None:
    """Raises ValueError where the SVD of this base weight has no meaning."""
    if not all_finite([weight]):
        raise ValueError(f"the base weight of {layer_name} has non-finite values; FuRA needs its SVD")


def warn_of_lost_weight(weight: torch.Tensor, fitted: torch.Tensor, layer_name: str) -> None:
    lost = float((fitted - weight).norm() / weight.norm())
    if lost > 1e-3:
        warnings.warn(
            f"{layer_name}: basis='random' keeps the base weight up to a relative error of {lost:.2f}; it is "
            "the paper's control, not a way to train",
            stacklevel=2,
        )


def resolve_block_size(size: int | str, cut: int, other: int, cut_name: str, layer_name: str) -> int:
    """The block size of one layer along the dimension `cut` that is cut into blocks.

    Raises:
        ValueError: where an int does not divide `cut`, naming the layer and the nearest sizes that do.
    """
    if size == "full":
        return cut
    if size == "auto":
        chosen = blocks.default_block_size(cut, other)
        if chosen in (1, cut) and cut > 3:
            warnings.warn(
                f"{layer_name}: {cut_name}={cut} has no factor pair near a square, so FuRA uses "
                f"{cut // chosen} block(s) of size {chosen}; give block_size to choose another",
                stacklevel=2,
            )
        return chosen
    if cut % size:
        usable = sorted(sorted(blocks.divisors(cut), key=lambda d: abs(d - size))[:3])
        raise ValueError(
            f"block_size={size} does not divide {cut_name}={cut} of {layer_name}; "
            f"use one of {', '.join(map(str, usable))}"
        )
    return size
