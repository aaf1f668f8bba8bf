"""One adapted linear layer: forward, forward and backward, peak memory of a training step, saved activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fura_rl.benchmark import measure
from fura_rl.benchmark.contenders import make_contenders, trained_numbers
from fura_rl.benchmark.measure import Settings


def run(settings: Settings) -> list[dict[str, Any]]:
    return [row for shape in settings.shapes for tokens in settings.tokens for row in compare(settings, shape, tokens)]


def compare(settings: Settings, shape: tuple[int, int], tokens: int) -> list[dict[str, Any]]:
    """One row per contender; ratios are fura's median over the contender's, so below 1 fura is faster or smaller."""
    out_features, in_features = shape
    options = {"device": settings.device, "dtype": settings.dtype}
    torch.manual_seed(0)
    linear = nn.Linear(in_features, out_features, bias=False, **options)
    contenders = make_contenders(linear)
    x = torch.randn(tokens, in_features, **options, requires_grad=True)  # as in the middle of a network
    grad = torch.randn(tokens, out_features, **options)
    expected = nn.functional.linear(x.detach().float(), linear.weight.detach().float())
    for name, layer in contenders.items():
        measure.check(f"{name} at the start", layer(x).detach(), expected, settings.dtype)
    check_after_a_step(contenders["fura"], x.detach(), settings.dtype)

    def forward(layer: nn.Module) -> Callable[[], Any]:
        return lambda: layer(x)

    def step(layer: nn.Module) -> Callable[[], Any]:
        def call() -> None:
            x.grad = None
            layer.zero_grad(set_to_none=True)
            layer(x).backward(grad)

        return call

    forwards = measure.interleaved_medians({n: forward(c) for n, c in contenders.items()}, settings)
    steps = measure.interleaved_medians({n: step(c) for n, c in contenders.items()}, settings)
    rows = []
    for name, layer in contenders.items():
        x.grad = None
        layer.zero_grad(set_to_none=True)
        rows.append(
            {
                "shape": f"{in_features}->{out_features}",
                "tokens": tokens,
                "layer": name,
                "trained": trained_numbers(layer),
                "forward_ms": 1e3 * forwards[name],
                "step_ms": 1e3 * steps[name],
                "peak_mb": training_bytes(layer, step(layer), settings.device) / 1e6,
                "saved_mb": measure.saved_activation_bytes(forward(layer), layer) / 1e6,
            }
        )
    fura = next(row for row in rows if row["layer"] == "fura")
    for row in rows:
        row["fura_step_ratio"] = fura["step_ms"] / row["step_ms"]
        row["fura_peak_ratio"] = fura["peak_mb"] / row["peak_mb"]
    return rows


def training_bytes(layer: nn.Module, step: Callable[[], Any], device: torch.device) -> int:
    """Peak of a training step with AdamW: weights, frozen bases, optimizer states, and what a step allocates."""
    held = sum(t.nbytes for t in [*layer.parameters(), *layer.buffers()])
    states = sum(2 * p.nbytes for p in layer.parameters() if p.requires_grad)
    return held + states + measure.peak_bytes(step, device)


@torch.no_grad()
def check_after_a_step(layer: nn.Module, x: torch.Tensor, dtype: torch.dtype) -> None:
    """The layer that is timed must compute its folded weight also away from the start."""
    trained = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    for parameter in trained.values():
        parameter.add_(0.02 * torch.randn_like(parameter))
    expected = nn.functional.linear(x.float(), layer.folded_weight(["default"]))
    measure.check("fura after a step", layer(x), expected, dtype)
    for parameter in trained.values():
        parameter.zero_()
