"""The proof that a sync arrived: the same few tokens, scored by the trainer and by the engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

# Largest |engine - trainer| log-prob in nats that rounding explains.  float32 was seen at 3e-6 over many models; 16-bit
# floors depend on the model (bfloat16: 2e-3 on average, some hundredths on single tokens), hence the wide margins.
# bitsandbytes' 8-bit product rounds activations as well, which no engine repeats: 0.02 on a tiny model.
TOLERANCE_NATS = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.5, torch.int8: 0.5}


class StaleEngineError(RuntimeError):
    """The rollout engine does not serve the policy that is being trained."""


@torch.no_grad()
def trainer_logprobs(model: nn.Module, token_ids: Sequence[int], **inputs: Any) -> torch.Tensor:
    """The trainer's side of `InProcessEngine.prompt_logprobs`: (len(token_ids) - 1,), in nats, float32 on CPU.

    `inputs` are what else the model's forward wants beside `input_ids`.
    """
    training = model.training
    model.eval()
    try:
        ids = torch.tensor([list(token_ids)], device=next(model.parameters()).device)
        logits = model(input_ids=ids, **inputs).logits[0, :-1].float()
        return logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0].cpu()
    finally:
        model.train(training)


def max_gap(left: torch.Tensor, right: torch.Tensor) -> float:
    """Largest absolute difference in nats; infinite where either side is not finite."""
    gap = (left - right).abs().max().item() if len(left) else 0.0
    return gap if gap == gap else float("inf")


def default_tolerance(*dtypes: torch.dtype) -> float:
    """The tolerance of the coarsest of `dtypes`."""
    return max(TOLERANCE_NATS.get(dtype, TOLERANCE_NATS[torch.bfloat16]) for dtype in dtypes)


def check(
    engine: torch.Tensor,  # (tokens,) log-probs of the engine
    trainer: torch.Tensor,  # (tokens,) log-probs of the trainer
    *,
    tolerance: float,
    previous: torch.Tensor | None,  # the trainer's log-probs at the sync before, or None at the first
    engine_dtype: torch.dtype,
    trainer_dtype: torch.dtype,
) -> float:
    """The largest gap in nats.

    Raises:
        StaleEngineError: where it exceeds `tolerance`, with the gap, its token and the likely cause.
    """
    gap = max_gap(engine, trainer)
    if gap <= tolerance:
        return gap
    if not torch.isfinite(engine).all() and torch.isfinite(trainer).all() and engine_dtype == torch.float16:
        cause = "the engine's log-probs are not finite: its activations exceed float16; set vllm_dtype=bfloat16"
    elif not torch.isfinite(engine).all():
        cause = "the engine's log-probs are not finite, so non-finite weights reached it: lower the learning rate"
    elif previous is not None and max_gap(engine, previous) <= min(tolerance, gap / 4):
        cause = "the engine still serves the weights of the sync before: nothing of this one arrived"
    elif engine_dtype != trainer_dtype:
        cause = f"the engine runs in {engine_dtype} and the trainer in {trainer_dtype}: set vllm_dtype to the trainer's"
    else:
        cause = (
            "a part of the weights did not arrive (a member of a fused module, a tied output head), or the engine "
            "loaded another base model than the trainer"
        )
    token = int((engine - trainer).abs().nan_to_num(nan=float("inf")).argmax())
    raise StaleEngineError(
        f"weight sync failed its proof: engine and trainer differ by {gap:.4g} nats at probe token {token + 1} "
        f"(engine {engine[token]:.4f}, trainer {trainer[token]:.4f}, tolerance {tolerance:g} for {engine_dtype}). "
        f"Likely cause: {cause}"
    )
