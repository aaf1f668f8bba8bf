"""Folding one layer for a sync: FuRA's closed form against LoRA's W + B A and against a copy of the weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fura_rl.benchmark import measure
from fura_rl.benchmark.contenders import make_contenders
from fura_rl.benchmark.measure import Settings
from fura_rl.sync.fold import folded_weight


def run(settings: Settings) -> list[dict[str, Any]]:
    return [row for shape in settings.budget.units("fold", settings.shapes) for row in compare(settings, shape)]


def compare(settings: Settings, shape: tuple[int, int]) -> list[dict[str, Any]]:
    """Every method folds out of place into float32 and rounds once to the weight's dtype, as the sync does."""
    out_features, in_features = shape
    torch.manual_seed(0)
    linear = nn.Linear(in_features, out_features, bias=False, device=settings.device, dtype=settings.dtype)
    layers = {name: layer for name, layer in make_contenders(linear).items() if name in ("fura", "lora", "dora", "oft")}
    for name, layer in layers.items():
        measure.check(f"{name}'s fold", folded_weight(layer), linear.weight.detach(), settings.dtype)
    calls = {name: lambda layer=layer: folded_weight(layer).to(settings.dtype) for name, layer in layers.items()}
    calls["copy"] = lambda: linear.weight.detach().float().to(settings.dtype, copy=True)
    times = measure.interleaved_medians(calls, settings)
    return [
        {
            "shape": f"{in_features}->{out_features}",
            "method": name,
            "fold_ms": 1e3 * seconds,
            "fura_ratio": times["fura"] / seconds,
            "peak_mb": measure.peak_bytes(calls[name], settings.device) / 1e6,
        }
        for name, seconds in times.items()
    ]
