"""What log-probs are checked against before a timing: a plain model in float32 with the policy's folded weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from fura_rl.benchmark.models import random_model
from fura_rl.sync.fold import checkpoint_weights

# Log-probs may be so many times further from float32 than those of the plain model in the same dtype, as RMS in nats:
# rounding alone gives 1e-2 in bfloat16 on Qwen3-0.6B and 4e-2 on Qwen3-1.7B, a missing adapter 0.3.
ROUNDINGS = 3.0
SMALLEST_TOLERANCE = 1e-4


@torch.no_grad()
def float32_reference(policy: nn.Module, size: str, device: torch.device, layers: int | None = None) -> nn.Module:
    """A plain model of that size with the policy's folded weights; its first decoder `layers` only where given."""
    reference = random_model(size, device, torch.float32, layers)
    missing = dict(reference.named_parameters())
    for weight in checkpoint_weights(policy):
        if (parameter := missing.pop(weight.name, None)) is not None:
            parameter.copy_(weight.value())
    if missing:
        raise RuntimeError(f"the policy has no weights for {', '.join(missing)} of its float32 reference")
    return reference


@torch.no_grad()
def check_logprobs_against(
    reference: nn.Module,
    score: Callable[[nn.Module], torch.Tensor],
    what: str,
    logprobs: torch.Tensor,
    dtype: torch.dtype,
) -> None:
    """Compare `logprobs`, computed in `dtype`, with `score(reference)`.  Leaves the reference in `dtype`.

    Raises:
        RuntimeError: naming `what`, where they are further apart than rounding explains.
    """
    exact = score(reference)
    rounded = score(reference.to(dtype))
    gap, rounding = (float((found - exact).square().mean().sqrt()) for found in (logprobs, rounded))
    tolerance = max(ROUNDINGS * rounding, SMALLEST_TOLERANCE)
    if not gap < tolerance:
        raise RuntimeError(
            f"{what} in {dtype} are {gap:.2g} nats (RMS) from those of the folded weights in float32; rounding "
            f"explains {tolerance:.2g}"
        )
