"""One adapted linear layer: forward, forward and backward, peak memory of a training step, saved activations.

On a GPU forward and backward are also timed as a CUDA graph: where a layer is small its launches take longer than its
kernels, and a training run may have both behind it (`torch.compile`, graphs).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fura_rl.benchmark import graphed, measure
from fura_rl.benchmark.contenders import make_contenders, trained_numbers
from fura_rl.benchmark.measure import Settings


def run(settings: Settings) -> list[dict[str, Any]]:
    rows = []
    uncaptured: set[str] = set()  # contenders that no CUDA graph takes
    for shape in settings.shapes:
        contenders = None  # made once a shape: decompositions cost more than the timings
        for _, tokens in settings.budget.units("layer", [(shape, tokens) for tokens in settings.tokens]):
            contenders = contenders or moved_contenders(settings, shape)
            rows += compare(settings, contenders, tokens, uncaptured)
    return rows


def moved_contenders(settings: Settings, shape: tuple[int, int]) -> dict[str, nn.Module]:
    """The contenders, each checked at its start and then moved as training would: FuRA skips its product at the start.
    Their gradients are checked once they have moved.

    A peer that fails here (a missing kernel) is named and left out; FuRA's failure is raised.
    """
    torch.manual_seed(0)
    linear = nn.Linear(shape[1], shape[0], bias=False, device=settings.device, dtype=settings.dtype)
    x = torch.randn(64, shape[1], device=settings.device, dtype=settings.dtype)
    expected = nn.functional.linear(x.float(), linear.weight.detach().float())
    contenders = make_contenders(linear)
    for name, layer in list(contenders.items()):
        try:
            measure.check(f"{name} at the start", forward_of(layer, x, settings)().detach(), expected, settings.dtype)
            measure.move(layer)
            check_gradients(name, layer, x, settings)
        except (RuntimeError, NotImplementedError) as error:
            if name in ("fura", "frozen"):
                raise
            print(f"layer: {name} left out: {error}", flush=True)
            del contenders[name]
    expected = nn.functional.linear(x.float(), contenders["fura"].folded_weight(["default"]))
    measure.check("fura after a step", forward_of(contenders["fura"], x, settings)().detach(), expected, settings.dtype)
    return contenders


def check_gradients(name: str, layer: nn.Module, x: torch.Tensor, settings: Settings) -> None:
    """Against those of a copy of the layer in float32, which shows what rounding does and not a wrong formula; the one
    of x that FuRA finds by hand also against that of its folded weight.  Raises as `measure.check`.
    """
    exact, plain = copy.deepcopy(layer).float(), replace(settings, dtype=torch.float32, autocast=False)
    leaves = x.detach().requires_grad_(), x.detach().float().requires_grad_()
    grad = torch.randn_like(forward_of(layer, x, settings)().detach())
    found = gradients_of(layer, leaves[0], grad, settings)()
    expected = gradients_of(exact, leaves[1], grad.float(), plain)()
    for i, pair in enumerate(zip(found, expected, strict=True)):
        measure.check(f"{name}, gradient {i}", *pair, settings.dtype)
    if name == "fura":
        folded = grad.float() @ exact.folded_weight(["default"])
        measure.check("fura, gradient of x by its folded weight", found[0], folded, settings.dtype)


def compare(
    settings: Settings, contenders: dict[str, nn.Module], tokens: int, uncaptured: set[str]
) -> list[dict[str, Any]]:
    """One row per contender; ratios are fura's median over the contender's, so below 1 fura is faster or smaller."""
    out_features, in_features = contenders["frozen"].weight.shape
    options = {"device": settings.device, "dtype": settings.dtype}
    x = torch.randn(tokens, in_features, **options, requires_grad=True)  # as in the middle of a network
    grad = torch.randn(tokens, out_features, **options)

    def forward(layer: nn.Module) -> Callable[[], torch.Tensor]:
        return forward_of(layer, x, settings)

    def step(layer: nn.Module) -> Callable[[], Any]:
        layer_forward = forward(layer)

        def call() -> None:
            x.grad = None
            layer.zero_grad(set_to_none=True)
            layer_forward().backward(grad)

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
    if settings.device.type == "cuda":
        gradients = {name: gradients_of(layer, x, grad, settings) for name, layer in contenders.items()}
        add_graph_times(rows, graphed.interleaved_medians(gradients, settings, uncaptured))
    return rows


def forward_of(layer: nn.Module, x: torch.Tensor, settings: Settings) -> Callable[[], torch.Tensor]:
    context = measure.autocast(settings)  # one for all calls: making it takes as long as entering it

    def call() -> torch.Tensor:
        with context:
            return layer(x)

    return call


def gradients_of(
    layer: nn.Module, x: torch.Tensor, grad: torch.Tensor, settings: Settings
) -> Callable[[], tuple[torch.Tensor, ...]]:
    """Forward and backward without `.grad`: a graph that accumulates would add to it at every replay."""
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    forward = forward_of(layer, x, settings)
    return lambda: torch.autograd.grad(forward(), wanted, grad, allow_unused=True)


def add_graph_times(rows: list[dict[str, Any]], seconds: dict[str, float | None]) -> None:
    """The columns of the times as CUDA graphs, empty (None) where fura or the contender has none."""
    ours = seconds["fura"]
    for row in rows:
        theirs = seconds[row["layer"]]
        row["graph_step_ms"] = None if theirs is None else 1e3 * theirs
        row["fura_graph_ratio"] = None if theirs is None or ours is None else ours / theirs


def training_bytes(layer: nn.Module, step: Callable[[], Any], device: torch.device) -> int:
    """Peak of a training step with AdamW: weights, frozen bases, optimizer states, and what a step allocates."""
    held = sum(t.nbytes for t in [*layer.parameters(), *layer.buffers()])
    states = sum(2 * p.nbytes for p in layer.parameters() if p.requires_grad)
    return held + states + measure.peak_bytes(step, device)
