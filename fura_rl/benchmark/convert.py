"""Conversion of one layer: our batched frame against one thin SVD per block, and against a batch of them."""

from __future__ import annotations

from typing import Any

import torch

from fura_rl.adapters import blocks, frames
from fura_rl.benchmark import measure
from fura_rl.benchmark.measure import Settings


def run(settings: Settings) -> list[dict[str, Any]]:
    return [row for shape in settings.shapes for row in compare(settings, shape)]


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
        return frames.svd_frame(weight, size).singular_values

    reference = one_by_one()
    measure.check("fura's singular values", ours(), reference, torch.float32)
    contenders = {"fura": ours, "svd per block": one_by_one, "svd batched": batched}
    times = measure.interleaved_medians(contenders, settings, warm_up=0)
    return [
        {
            "shape": f"{in_features}->{out_features}",
            "blocks": f"{in_features // size} x {size}",
            "method": name,
            "convert_ms": 1e3 * seconds,
            "fura_speedup": seconds / times["fura"],
            "peak_mb": measure.peak_bytes(contenders[name], settings.device) / 1e6,
        }
        for name, seconds in times.items()
    ]
