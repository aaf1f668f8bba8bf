"""One weight sync: fold what changed, hand it to the engine, prove that it arrived, report what it cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fura_rl.adapters.quantized import keep_layout
from fura_rl.sync import probe
from fura_rl.sync.fold import CheckpointWeight, checkpoint_weights, pristine_weight
from fura_rl.sync.vllm_engine import InProcessEngine


@dataclass(frozen=True)
class SyncReport:
    """What one sync did.

    `update_cosine` is the cosine between the exact update W' - W of all adapted layers and the part of it that survives
    rounding to the engine's dtype: 1 means nothing was lost, near 0 that the engine hardly moved.  It is 1 while the
    update is 0, and None where no base weight is kept to compare with (full fine-tuning in another dtype).
    `probe_max_gap` is in nats, None where this sync was not probed.
    """

    seconds: float
    payload_bytes: int
    probe_max_gap: float | None
    update_cosine: float | None

    def metrics(self) -> dict[str, float]:
        values = {
            "sync/seconds": self.seconds,
            "sync/payload_bytes": float(self.payload_bytes),
            "sync/probe_max_gap": self.probe_max_gap,
            "sync/update_cosine": self.update_cosine,
        }
        return {name: value for name, value in values.items() if value is not None}


class UpdateCosine:
    """Accumulates <exact, delivered> / (|exact| |delivered|) over layers, in float64."""

    def __init__(self) -> None:
        self.dot = self.exact_square = self.delivered_square = 0.0

    def add(self, exact: torch.Tensor, delivered: torch.Tensor) -> None:
        exact, delivered = exact.flatten().double(), delivered.flatten().double()
        self.dot += float(exact @ delivered)
        self.exact_square += float(exact @ exact)
        self.delivered_square += float(delivered @ delivered)

    def value(self) -> float:
        if self.exact_square == 0:
            return 1.0
        if self.delivered_square == 0:
            return 0.0
        return self.dot / (self.exact_square * self.delivered_square) ** 0.5


class WeightSync:
    """Pushes the policy's current weights into one engine.

    Args:
        model: the policy, plain or PEFT, unsharded.
        engine: where the weights go.
        probe_token_ids: the fixed tokens that both sides score; at least two.
        probe_every: probe at every N-th sync; the first is always probed.
        probe_tolerance: largest accepted gap in nats; None takes the default of the coarser dtype.
        compute_dtype: the dtype that the policy's forward runs in (its autocast dtype, where it has one).
        score: log-probs of token ids under the policy; replaced where the forward needs an autocast context.
    """

    def __init__(
        self,
        model: nn.Module,
        engine: InProcessEngine,
        probe_token_ids: Sequence[int],
        *,
        probe_every: int = 1,
        probe_tolerance: float | None = None,
        compute_dtype: torch.dtype | None = None,
        score: Callable[[nn.Module, Sequence[int]], torch.Tensor] = probe.trainer_logprobs,
    ) -> None:
        self.model = model
        self.engine = engine
        self.probe_token_ids = list(probe_token_ids)
        self.probe_every = probe_every
        self.compute_dtype = compute_dtype or next(model.parameters()).dtype
        dtypes = {engine.dtype, self.compute_dtype, *(p.dtype for p in model.parameters() if p.dtype == torch.int8)}
        self.probe_tolerance = probe_tolerance or probe.default_tolerance(*dtypes)
        for module in model.modules():
            keep_layout(module)
        self.score = score
        self.version = 0
        self._previous_logprobs: torch.Tensor | None = None

    def sync(self, everything: bool = False) -> SyncReport:
        """Bring the engine to the policy's current weights.

        With `everything`, unadapted weights are sent too: for an engine whose memory was discarded while it slept.
        The first sync also sends every weight that the policy holds quantized and the engine in 16 bits.

        Raises:
            FloatingPointError: where a trained parameter is not finite; the engine keeps the weights it has.
            StaleEngineError: where the engine does not compute what the trainer computes afterwards.
        """
        started = time.perf_counter()
        weights = checkpoint_weights(self.model)
        refuse_non_finite(weights)
        cosine, payload_bytes = UpdateCosine(), 0
        all_kept = True  # whether every trained weight has its base value at hand, for the cosine

        def stream() -> Iterator[tuple[str, torch.Tensor]]:
            nonlocal payload_bytes, all_kept
            for weight in select_weights(weights, self.engine.fused_modules, everything, first=self.version == 0):
                exact = weight.value()
                delivered = exact.to(self.engine.dtype)
                payload_bytes += delivered.numel() * delivered.element_size()
                if weight.layer is not None and delivered.dtype != exact.dtype:
                    base = pristine_weight(weight)
                    cosine.add(exact - base.to(exact.dtype), delivered.float() - base.to(delivered.dtype).float())
                elif weight.trained and delivered.dtype != exact.dtype:
                    all_kept = False
                yield weight.name, delivered

        self.engine.load(stream())
        self.version += 1
        gap = self._probe() if (self.version - 1) % self.probe_every == 0 else None
        return SyncReport(
            seconds=time.perf_counter() - started,
            payload_bytes=payload_bytes,
            probe_max_gap=gap,
            update_cosine=cosine.value() if all_kept else None,
        )

    def _probe(self) -> float:
        trainer = self.score(self.model, self.probe_token_ids)
        gap = probe.check(
            self.engine.prompt_logprobs(self.probe_token_ids),
            trainer,
            tolerance=self.probe_tolerance,
            previous=self._previous_logprobs,
            engine_dtype=self.engine.dtype,
            trainer_dtype=self.compute_dtype,
        )
        self._previous_logprobs = trainer
        return gap


def refuse_non_finite(weights: list[CheckpointWeight]) -> None:
    """Look before the load: a NaN would stay in the engine's key-value cache after the weights are mended.

    Raises:
        FloatingPointError: naming the first weight that a non-finite trained parameter reaches.
    """
    trained = [(weight.name, p) for weight in weights for p in weight.trained_parameters()]
    if not trained or torch.stack([p.isfinite().all() for _, p in trained]).all():
        return
    name = next(name for name, p in trained if not p.isfinite().all())
    raise FloatingPointError(
        f"the trained parameters of {name} are not finite, so the policy diverged: lower learning_rate or max_grad_norm"
    )


def select_weights(
    weights: list[CheckpointWeight], fused_modules: dict[str, list[str]], everything: bool, first: bool = False
) -> list[CheckpointWeight]:
    """The weights to send: those that training changes, and every tensor of a module fused with one of them.

    At the `first` sync those too that the policy holds quantized, since the engine has the checkpoint's own.
    """
    if everything:
        return weights
    changed = [weight for weight in weights if weight.trained or (first and weight.quantized is not None)]
    touched = {owner(weight.module_name, fused_modules) for weight in changed}
    return [weight for weight in weights if owner(weight.module_name, fused_modules) in touched]


def owner(module_name: str, fused_modules: dict[str, list[str]]) -> str:
    """The engine's name for the module that holds this checkpoint module: `...self_attn.q_proj` -> `...qkv_proj`."""
    parent, _, leaf = module_name.rpartition(".")
    for fused, members in fused_modules.items():
        if leaf in members:
            return f"{parent}.{fused}"
    return module_name
