"""Conversion of one layer: our batched frame against one thin SVD per block, and against a batch of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fura_rl.adapters import blocks, frames
from fura_rl.adapters.conversion import check_weight
from fura_rl.benchmark import measure
from fura_rl.benchmark.measure import Settings
from fura_rl.benchmark.models import layer_shapes, projection_shapes


def run(settings: Settings) -> list[dict[str, Any]]:
    """A row per shape and method, then for each model size the sum over one decoder layer's seven projections."""
    rows = [row for shape in settings.budget.units("convert", settings.shapes) for row in compare(settings, shape)]
    return rows + [row for size in settings.sizes for row in decoder_layer(size, rows)]


def compare(settings: Settings, shape: tuple[int, int]) -> list[dict[str, Any]]:
    out_features, in_features = shape
    torch.manual_seed(0)
    weight = torch.randn(out_features, in_features, device=settings.device).to(settings.dtype)
    size = blocks.default_block_size(in_features, out_features)

    def one_by_one() -> torch.Tensor:
        parts = [torch.linalg.svd(block, full_matrices=False)[1] for block in weight.float().split(size, dim=1)]
        return torch.stack(parts)

    def batched() -> torch.Tensor:
        return torch.linalg.svd(weight.float().reshape(out_features, -1, size).transpose(0, 1), full_matrices=False)[1]

    def ours() -> torch.Tensor:
        check_weight(weight, shape_name(shape))
        return frames.svd_frame(weight, size).singular_values

    measure.check("fura's singular values", ours(), one_by_one(), torch.float32)
    contenders: dict[str, Callable[[], torch.Tensor]] = {
        "fura": ours, "svd per block": one_by_one, "svd batched": batched
    }  # fmt: skip
    times = measure.interleaved_medians(contenders, settings, warm_up=0)
    return [
        {
            "shape": shape_name(shape),
            "blocks": f"{in_features // size} x {size}",
            "method": name,
            "convert_ms": 1e3 * seconds,
            "fura_speedup": seconds / times["fura"],
            "peak_mb": measure.peak_process_bytes(contenders[name], settings.device) / 1e6,
        }
        for name, seconds in times.items()
    ]


def shape_name(shape: tuple[int, int]) -> str:
    return f"{shape[1]}->{shape[0]}"


def decoder_layer(size: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the seven projections of one decoder layer cost together; nothing where a shape of it was skipped."""
    found = {(row["shape"], row["method"]): row for row in rows}
    methods = dict.fromkeys(row["method"] for row in rows)
    if any((shape_name(shape), name) not in found for shape in layer_shapes(size) for name in methods):
        return []
    parts = {name: [found[shape_name(shape), name] for shape in projection_shapes(size)] for name in methods}
    sums = {name: sum(row["convert_ms"] for row in part) for name, part in parts.items()}
    return [
        {
            "shape": f"{size}, a decoder layer",
            "blocks": "all",
            "method": name,
            "convert_ms": total,
            "fura_speedup": total / sums["fura"],
            "peak_mb": max(row["peak_mb"] for row in parts[name]),
        }
        for name, total in sums.items()
    ]
