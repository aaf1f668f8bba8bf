"""One weight sync: fold what changed, hand it to the engine, prove that it arrived, report what it cost."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from fura_rl.adapters.quantized import keep_layout
from fura_rl.sync import probe
from fura_rl.sync.audit import KernelAudit, stale_modules
from fura_rl.sync.fold import CheckpointWeight, checkpoint_weights, pristine_weight
from fura_rl.sync.rounding import ROUNDINGS, round_weight
from fura_rl.sync.vllm_engine import InProcessEngine

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SyncReport:
    """What one sync did.

    `seconds` is its wall time and `phases` the shares of fold, load, audit and probe.  `payload_bytes` were handed to
    the engine, `dense_bytes` is the whole checkpoint, which a sync of every weight would send.  `update_cosine` is the
    cosine between the exact update W' - W of all adapted layers and the part of it that survives rounding to the
    engine's dtype: 1 means nothing was lost, near 0 that the engine hardly moved.  It is 1 while the update is 0, and
    None where no base weight is kept to compare with (full fine-tuning in another dtype).  `audit_gain_min` is the
    least gain of an audited kernel (1 fresh, 0 stale), None where no update was large enough to be seen.
    `probe_max_gap` is in nats, None where this sync was not probed.
    """

    version: int
    seconds: float
    phases: dict[str, float]
    payload_bytes: int
    dense_bytes: int
    probe_max_gap: float | None
    audit_gain_min: float | None
    update_cosine: float | None

    def metrics(self) -> dict[str, float]:
        values = {
            "sync/version": float(self.version),
            "sync/seconds": self.seconds,
            **{f"sync/{phase}_seconds": seconds for phase, seconds in self.phases.items()},
            "sync/payload_bytes": float(self.payload_bytes),
            "sync/dense_bytes": float(self.dense_bytes),
            "sync/audit_gain_min": self.audit_gain_min,
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


@dataclass
class Push:
    """What one pass of weights into the engine came to."""

    cosine: UpdateCosine = field(default_factory=UpdateCosine)
    payload_bytes: int = 0
    all_bases_kept: bool = True  # whether every trained weight has its base value at hand, for the cosine
    fold_seconds: float = 0.0


class WeightSync:
    """Pushes the policy's current weights into one engine.

    Args:
        model: the policy, plain or PEFT, unsharded.
        engine: where the weights go.
        probe_token_ids: the fixed tokens that both sides score; at least two.
        probe_every: probe at every N-th sync; the first is always probed.
        probe_tolerance: largest accepted gap in nats; None takes the default of the coarser dtype.
        audit_every: audit the engine's kernels at every N-th sync; 0 never.
        rounding: how folded weights are rounded to a 16-bit engine, "nearest" or "stochastic" (seeded by `seed`).
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
        audit_every: int = 1,
        rounding: str = "nearest",
        seed: int = 0,
        compute_dtype: torch.dtype | None = None,
        score: Callable[[nn.Module, Sequence[int]], torch.Tensor] = probe.trainer_logprobs,
    ) -> None:
        if rounding not in ROUNDINGS:
            raise ValueError(f"rounding={rounding!r} is not one of {', '.join(ROUNDINGS)}")
        self.model = model
        self.engine = engine
        self.audit_every = audit_every
        self.rounding = rounding
        self.seed = seed
        self.audit = KernelAudit()
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
        clock = [time.perf_counter()]
        weights = checkpoint_weights(self.model)
        refuse_non_finite(weights)
        chosen = select_weights(weights, self.engine.fused_modules, everything, first=self.version == 0)
        push = self._push(chosen)
        clock.append(time.perf_counter())
        gains = self._audit(chosen) if self.audit_every and self.version % self.audit_every == 0 else {}
        clock.append(time.perf_counter())
        self.version += 1
        gap = self._probe() if (self.version - 1) % self.probe_every == 0 else None
        clock.append(time.perf_counter())
        pushing, auditing, probing = (after - before for before, after in itertools.pairwise(clock))
        return SyncReport(
            version=self.version,
            seconds=clock[-1] - clock[0],
            phases={
                "fold": push.fold_seconds,
                "load": pushing - push.fold_seconds,
                "audit": auditing,
                "probe": probing,
            },
            payload_bytes=push.payload_bytes,
            dense_bytes=sum(w.element_count for w in weights) * self.engine.dtype.itemsize,
            probe_max_gap=gap,
            audit_gain_min=min(gains.values(), default=None),
            update_cosine=push.cosine.value() if push.all_bases_kept else None,
        )

    def _push(self, chosen: list[CheckpointWeight]) -> Push:
        """Fold `chosen` one by one into the engine, noting what each of its kernels must compute afterwards."""
        push = Push()
        rows = rows_within_owner(chosen, self.engine.fused_modules)
        generator = None
        if self.rounding == "stochastic" and self.engine.dtype.itemsize == 2:
            device = next(self.model.parameters()).device
            generator = torch.Generator(device).manual_seed(hash((self.seed, self.version)) % 2**63)

        def stream() -> Iterator[tuple[str, torch.Tensor]]:
            for weight in chosen:
                started = time.perf_counter()
                exact = weight.value()
                delivered = round_weight(exact, self.engine.dtype, generator if weight.trained else None)
                push.payload_bytes += delivered.numel() * delivered.element_size()
                rounded = delivered.dtype != exact.dtype
                # the cosine compares with the base at every sync, the audit at a layer's first
                needs_base = rounded or not self.audit.knows(weight.module_name)
                base = pristine_weight(weight) if weight.layer is not None and needs_base else None
                if base is not None and rounded:
                    push.cosine.add(exact - base.to(exact.dtype), delivered.float() - base.to(delivered.dtype).float())
                elif weight.trained and rounded:
                    push.all_bases_kept = False
                if self.audit_every and weight.trained and weight.name in rows:
                    self.audit.expect(
                        weight.module_name, delivered, base, owner(weight.module_name, self.engine.fused_modules),
                        rows[weight.name],
                    )  # fmt: skip
                push.fold_seconds += time.perf_counter() - started
                yield weight.name, delivered

        self.engine.load(stream())
        return push

    def _audit(self, chosen: list[CheckpointWeight]) -> dict[str, float]:
        """The gains of the engine's kernels, all fresh; what is stale is sent once more before the run is stopped.

        Raises:
            StaleEngineError: naming the modules that did not take their weights twice.
        """
        gains = self.audit.gains(self.engine)
        if stale := stale_modules(gains):
            logger.warning("weight sync: %s did not take the new weights; sending them once more", ", ".join(stale))
            self._push(chosen)
            gains = self.audit.gains(self.engine)
        if stale := stale_modules(gains):
            raise probe.StaleEngineError(stale_message(stale, gains))
        self.audit.accept(gains)
        return gains

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


def stale_message(stale: list[str], gains: dict[str, float]) -> str:
    shown = ", ".join(f"{name} (gain {gains[name]:.2f})" for name in stale[:8])
    more = f" and {len(stale) - 8} more" if len(stale) > 8 else ""
    cause = (
        "nothing of this sync arrived: the engine still serves the weights of the sync before"
        if len(stale) == len(gains)
        else "these modules were skipped, or their kernels were not rebuilt"
    )
    return (
        f"weight sync failed its audit: {len(stale)} of {len(gains)} modules do not compute with the weights they were "
        f"sent, twice: {shown}{more}. Gain 1 is fresh, 0 stale. Likely cause: {cause}. Rollouts would come from "
        "another policy than the one trained, so the run stops here"
    )


def rows_within_owner(
    weights: list[CheckpointWeight], fused_modules: dict[str, list[str]]
) -> dict[str, tuple[int, int]]:
    """Where each linear weight's output features lie in the engine's layer, members of a fused one in vLLM's order."""
    matrices = {w.module_name: w for w in weights if w.name.endswith(".weight") and len(w.shape) == 2}
    rows = {}
    for module_name, weight in matrices.items():
        parent, _, leaf = module_name.rpartition(".")
        members = next((members for members in fused_modules.values() if leaf in members), [leaf])
        siblings = [matrices.get(f"{parent}.{member}") for member in members]
        before = siblings[: members.index(leaf)]
        if None not in siblings:
            start = sum(sibling.shape[0] for sibling in before)
            rows[weight.name] = (start, start + weight.shape[0])
    return rows


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
