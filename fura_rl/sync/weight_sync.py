"""One weight sync: say what changed, have the engine fold it in, prove that it arrived, report what it cost."""

from __future__ import annotations

import functools
import itertools
import logging
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn

from fura_rl.adapters.quantized import keep_layout
from fura_rl.finite import all_finite
from fura_rl.sync import probe
from fura_rl.sync.audit import KernelAudit
from fura_rl.sync.audit_schedule import AuditSchedule
from fura_rl.sync.checkpoint_names import CheckpointNames
from fura_rl.sync.engine import LazyFactors, Push, RolloutEngine, Update
from fura_rl.sync.factors import Factors
from fura_rl.sync.fingerprint import Sample, base_sample
from fura_rl.sync.fold import BaseSlices, CheckpointWeight, checkpoint_weights
from fura_rl.sync.fold_rules import core_to_batch, small_factors, small_factors_together
from fura_rl.sync.proof import Delivery, SyncProof
from fura_rl.sync.remote_engine import Follower
from fura_rl.sync.rounding import ROUNDINGS
from fura_rl.sync.sharding import decided_by_the_first, failing_together, gathered, is_piece, local
from fura_rl.sync.shifted_base import relative_to_start, starts_of_shifted_bases
from fura_rl.sync.update_watch import UpdateWatch

logger = logging.getLogger(__name__)

# Of block matrices that are made at once, so many bytes at most: on a CPU few, since to bring larger ones together
# costs more than it saves, elsewhere less than the weights of a layer.
BATCH_BYTES = 32 * 2**20
CPU_BATCH_BYTES = 2**17

SYNC_MODES = ("auto", "dense", "factored")

Delivered = TypeVar("Delivered")


@dataclass(frozen=True)
class SyncReport:
    """What one sync did.

    `seconds` is its wall time and `phases` the shares of the engine's phases, audit and probe.  `payload_bytes` crossed
    to the engine (in process: were written), `dense_bytes` is the whole checkpoint, which a sync of every weight would
    send.  `update_cosine` is the cosine between the exact update W' - W, on sampled rows of all adapted layers, and the
    part of it that survives rounding to the engine's dtype: 1 means nothing was lost, near 0 that the engine hardly
    moved.  It is 1 while the update is 0, and None where no base weight is kept to compare with (full fine-tuning in
    another dtype).  `audit_gain_min` is the least gain of an audited kernel (1 fresh, 0 stale), None where no update
    was large enough to be seen or the sync was not audited; the phase `audit` is then what `update_cosine` took.
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


class WeightSync:
    """Brings one engine to the policy's current weights, again and again.

    Args:
        model: the policy, plain or PEFT; sharded (FSDP2, ZeRO-3) only where the engine reads its own checkpoint.
        engine: where the weights go.
        probe_token_ids: the fixed tokens that both sides score; at least two.
        probe_every: probe at every N-th sync; the first is always probed.
        probe_tolerance: largest accepted gap in nats; None takes the default of the coarser dtype.
        audit_every: audit the engine's kernels at every N-th sync; 0 never, None as often as rollouts pay for it.
        rollout_seconds: how long rollouts have taken in total, for that; as it stands, all the time that passes.
        mode: "factored" sends small factors, "dense" whole weights, "auto" small factors where the method has them.
        rounding: how folded weights are rounded to a 16-bit engine, "nearest" or "stochastic" (seeded by `seed`).
        compute_dtype: the dtype that the policy's forward runs in (its autocast dtype, where it has one).
        score: log-probs of token ids under the policy; replaced where the forward needs an autocast context.

    Raises:
        ValueError: for an unknown mode or rounding, for "factored" where a weight has no small form, or where the
            engine's dtype cannot hold the weights.
    """

    def __init__(
        self,
        model: nn.Module,
        engine: RolloutEngine,
        probe_token_ids: Sequence[int],
        *,
        probe_every: int = 10,
        probe_tolerance: float | None = None,
        audit_every: int | None = 1,
        rollout_seconds: Callable[[], float] = time.perf_counter,
        mode: str = "auto",
        rounding: str = "nearest",
        seed: int = 0,
        compute_dtype: torch.dtype | None = None,
        score: Callable[[nn.Module, Sequence[int]], torch.Tensor] = probe.trainer_logprobs,
    ) -> None:
        if rounding not in ROUNDINGS:
            raise ValueError(f"rounding={rounding!r} is not one of {', '.join(ROUNDINGS)}")
        if mode not in SYNC_MODES:
            raise ValueError(f"mode={mode!r} is not one of {', '.join(SYNC_MODES)}")
        self.model = model
        self.engine = engine
        self.follows = isinstance(engine, Follower)  # another process of this trainer talks to the engine
        self.audits = AuditSchedule(audit_every)
        self.rollout_seconds = rollout_seconds
        self.mode = mode
        self.rounding = rounding
        self.seed = seed
        self.probe_every = probe_every
        compute_dtype = compute_dtype or next(model.parameters()).dtype
        self.proof = SyncProof(model, engine, probe_token_ids, score, probe_tolerance, compute_dtype)
        for module in model.modules():
            keep_layout(module)
        self.version = 0  # of the last sync; a resumed run goes on counting from its checkpoint
        self._first = True  # nothing has reached the engine yet
        self._unproved = True  # what reaches it next is no step of what was proved before
        self._syncs_since_audit = 0
        self._rounding_seed: int | None = None  # of the last push
        self._begun: set[str] = set()  # weights of the last delivery whose making, and gathering, has begun
        self._alike: dict[str, list[CheckpointWeight]] = {}  # weight of a delivery -> those made with it
        self._ahead: dict[str, Factors] = {}  # made with another one, and not yet asked for
        self._names = CheckpointNames(model)
        self.weights = self._current_weights()
        if mode == "factored":
            refuse_without_small_form(self.weights.values())
        if engine.dtype == torch.float16:
            refuse_beyond_float16(self.weights.values())
        self._starts = {} if engine.reads_the_trainers_base else starts_of_shifted_bases(self.weights.values(), model)
        shapes = {name: weight.shape for name, weight in self.weights.items()}
        stacks = {name: weight.parts for name, weight in self.weights.items() if weight.parts}
        engine.prepare(shapes, stacks, self._base_samples())

    def prove_next(self) -> None:
        """The policy was replaced, by that of a checkpoint: probe and audit the next sync, whatever is due."""
        self._unproved = True

    def version_served(self) -> int:
        """The version that this trainer has brought the engine to, from which rollouts come.

        That a server still holds it is asked before and after they are sampled (`RolloutClient`).

        Raises:
            StaleEngineError: where it is not that of the last sync.
        """
        if self.engine.version != self.version:
            raise probe.StaleEngineError(
                f"rollouts were sampled from version {self.engine.version} of the policy, and the last sync brought "
                f"the engine to version {self.version}: another sync wrote to it. Resume from the last checkpoint"
            )
        return self.version

    def _current_weights(self) -> dict[str, CheckpointWeight]:
        """By name in the checkpoint; looked up anew at every sync, since sharding a model replaces its parameters."""
        weights = self._names.named(checkpoint_weights(self.model))
        if not self.engine.reads_the_trainers_base:
            return weights
        return {name: replace(w, held_otherwise=False) if w.held_otherwise else w for name, w in weights.items()}

    def _base_samples(self) -> dict[str, Sample]:
        """A few numbers of every base weight at hand, which the engine's own must have as well: what is adapted is
        folded from it, what is not is served from it.

        Left out is what no longer has, or never had, the checkpoint's value: fully trained, quantized, or made into a
        large core.  Nothing is lost by that, since an engine serves none of those from its checkpoint: they are sent
        whole.  Of a policy that holds every linear layer so, the embeddings and norms still tell the base.  Left out,
        too, are stacks of experts beside which none is trained, which a checkpoint may hold in any form.
        """
        if self.engine.reads_the_trainers_base or self.follows:
            return {}
        stacks = {weight.module_name for weight in self.weights.values() if weight.trained and len(weight.shape) == 3}
        return {
            name: base_sample(
                self._checkpoint_read(weight),
                weight.local_rows,
                weight.matrix_shape[1],
                moved=weight.read_local() if name in self._starts else None,
            )
            for name, weight in self.weights.items()
            if weight.holds_the_checkpoints
            if len(weight.shape) < 3 or (weight.module_name in stacks and not weight.held_otherwise)
            if weight.local_rows[0] < weight.local_rows[1]
        }

    def sync(self, everything: bool = False) -> SyncReport:
        """Bring the engine to the policy's current weights.

        With `everything`, unadapted weights are sent too: for an engine whose memory was discarded while it slept.
        The first sync also sends every weight that the policy holds quantized and the engine in 16 bits; later ones
        hand them over unread, for an engine that was started again and would serve its checkpoint's.  Some go along
        every time, see `_sent_along`.

        Raises:
            FloatingPointError: where a trained parameter is not finite; the engine keeps the weights it has.
            StaleEngineError: where the engine does not compute what the trainer computes afterwards.
        """
        clock = [time.perf_counter()]
        self.weights = self._current_weights()
        with failing_together():
            refuse_non_finite(self.weights.values())
        along = self._sent_along()
        chosen = [
            weight
            for weight in self.weights.values()
            if everything or weight.trained or (self._first and weight.quantized is not None) or weight.name in along
        ]
        # of a policy in pieces every process audits the rows it holds, else the one that speaks to the engine all
        shared = any(is_piece(weight.parameter) for weight in self.weights.values())
        self._syncs_since_audit += 1
        audited = decided_by_the_first(
            lambda: self.audits.due(self.version, self._unproved, self.rollout_seconds(), self._syncs_since_audit)
        )
        # without an audit what the engine must compute is noted anew at the next
        watch = self._watch(self.proof.audit if audited else None, shared)
        probed = self._unproved or self.version % self.probe_every == 0
        clock.append(time.perf_counter())
        # before the push: where policy and engine share their storage, the policy's forward would undo it
        expected = self.proof.expected() if probed else None
        clock.append(time.perf_counter())
        with failing_together():
            push = self._push(chosen, watch, shared)
        clock.append(time.perf_counter())
        again = watch if audited else self._watch(self.proof.audit, shared)
        resend = functools.partial(self._resend, chosen, again, shared)
        delivery = Delivery(self.weights, self._syncs_since_audit, shared, resend)
        if audited:
            self._syncs_since_audit = 0
        with failing_together():
            gains = self.proof.by_audit(delivery) if audited and (shared or not self.follows) else {}
        clock.append(time.perf_counter())
        self.version += 1
        gap = None if expected is None else self.proof.by_probe(delivery, expected, gains if audited else None)
        self._first = self._unproved = False
        clock.append(time.perf_counter())
        _, scoring, _, auditing, probing = (after - before for before, after in itertools.pairwise(clock))
        if audited:
            self.audits.audited(auditing + watch.audit_seconds, self.rollout_seconds())
        return SyncReport(
            version=self.version,
            seconds=clock[-1] - clock[0],
            phases={**push.phases, "audit": auditing + watch.seconds, "probe": scoring + probing},
            payload_bytes=push.payload_bytes,
            dense_bytes=sum(w.element_count for w in self.weights.values()) * self.engine.dtype.itemsize,
            probe_max_gap=gap,
            audit_gain_min=min((gain.value for gain in gains.values()), default=None),
            update_cosine=watch.cosine.value() if watch.all_bases_kept and not self.follows else None,
        )

    def _sent_along(self) -> set[str]:
        """What an engine writes whenever it writes a trained weight, and cannot read from its own checkpoint.

        An engine rebuilds a module whole.  Its checkpoint holds stacks of experts in a form that it may not know, and
        in the place of a quantized layer the layer from before.  Which layers an engine makes one module of (q, k, v;
        gate, up) is its own business: they lie beside each other in one submodule of the policy.
        """
        if self.engine.reads_the_trainers_base:
            return set()
        trained = [weight for weight in self.weights.values() if weight.trained]
        stacks = {weight.module_name for weight in trained if weight.held_otherwise}
        parents = {parent_of(weight.module_name) for weight in trained}
        return {
            name
            for name, weight in self.weights.items()
            if (weight.held_otherwise and weight.module_name in stacks)
            or (weight.quantized is not None and parent_of(weight.module_name) in parents)
        }

    def _watch(self, audit: KernelAudit | None, shared: bool) -> UpdateWatch:
        return UpdateWatch(
            audit,
            self.engine.dtype,
            self._checkpoint_read,
            processes=dist.get_world_size() if shared else 1,
            looks=shared or not self.follows,
        )

    def _push(self, chosen: list[CheckpointWeight], watch: UpdateWatch, shared: bool) -> Push:
        """Hand `chosen` to the engine, noting what each of its kernels must compute afterwards."""
        self._rounding_seed = None
        if self.rounding == "stochastic" and self.engine.dtype.itemsize == 2:
            self._rounding_seed = hash((self.seed, self.version)) % 2**62
        self._alike = batches(chosen) if self.mode != "dense" else {}
        factors = LazyFactors({weight.name: functools.partial(self._make, weight) for weight in chosen})
        sent_before = {
            name: functools.partial(self._factors, weight)
            for name, weight in self.weights.items()
            if weight.quantized is not None and name not in factors
        }
        update = Update(
            version=self.version + 1,
            previous=self.version,
            factors=factors,
            read=lambda name: self.weights[name].read(),
            rounding_seed=self._rounding_seed,
            read_once=shared,
            sent_before=LazyFactors(sent_before),
        )
        push = self._watched(lambda: self.engine.push(update), chosen, watch, shared)
        phases = dict(push.phases)
        phases["fold"] = max(0.0, phases.get("fold", 0.0) - watch.seconds)
        watch.finish()
        return Push(push.payload_bytes, phases)

    def _resend(self, chosen: list[CheckpointWeight], watch: UpdateWatch, shared: bool) -> None:
        """Send `chosen` once more, and note what an audit must see of it where that was not noted before.

        It is noted now and not when it is asked for: an engine that shares the policy's storage has the base weights
        only until it has folded them.
        """
        self._watched(self.engine.resend, chosen, watch, shared)
        watch.finish()

    def _watched(
        self, deliver: Callable[[], Delivered], chosen: list[CheckpointWeight], watch: UpdateWatch, shared: bool
    ) -> Delivered:
        """`deliver()`, with `watch` looking at every weight of `chosen` on its way."""
        self._looking, self._begun = watch, set()
        try:
            delivered = deliver()
            for weight in chosen:
                if not watch.saw(weight):  # the engine never asked for it: then the audit must miss it
                    self._make(weight)
        except Exception:
            if shared:
                self._gather_along([weight for weight in chosen if weight.name not in self._begun])
            raise
        finally:
            self._ahead.clear()
        return delivered

    def _make(self, weight: CheckpointWeight) -> Factors:
        """What an engine is sent of `weight`, whenever it asks for it."""
        self._begun.add(weight.name)
        if weight.name in self._alike and weight.name not in self._ahead:
            together = self._alike[weight.name]
            made = small_factors_together([one.layer for one in together])
            self._ahead |= {one.name: factors for one, factors in zip(together, made, strict=True)}
        factors = self._ahead.pop(weight.name, None) or self._factors(weight)
        self._looking.note(weight, factors, self._rounding_seed)
        return factors

    def _gather_along(self, weights: Iterable[CheckpointWeight]) -> None:
        """Take part in the gathers of `weights`, in which the other processes wait for this one, which has failed."""
        for weight in weights:
            try:
                self._factors(weight)
            except Exception as error:
                logger.warning("weight sync: %s could not be gathered after a failure: %r", weight.name, error)

    def _factors(self, weight: CheckpointWeight) -> Factors:
        if self.mode == "dense":
            return weight.dense_factors()
        factors, start = weight.factors(), self._starts.get(weight.name)
        return factors if start is None else relative_to_start(factors, start)

    def _checkpoint_read(self, weight: CheckpointWeight) -> BaseSlices:
        """This process's rows of the base weight as the checkpoint has it, also where making the adapter moved it."""
        return replace(weight.read_local(), start=self._starts.get(weight.name))


def batches(weights: Iterable[CheckpointWeight]) -> dict[str, list[CheckpointWeight]]:
    """Weight -> those near it in `weights` whose factors are made with its own: of one block size, within the limit."""
    last: dict[Hashable, tuple[list[CheckpointWeight], int]] = {}  # of every kind, and their bytes
    found: dict[str, list[CheckpointWeight]] = {}
    for weight in weights:
        core = None if weight.layer is None else core_to_batch(weight.layer)
        if core is None:
            continue
        limit = CPU_BATCH_BYTES if core.basis_v.device.type == "cpu" else BATCH_BYTES
        batch, size = last.get(core.update_kind, ([], 0))
        if size + core.basis_v.nbytes > limit:
            batch, size = [], 0
        batch.append(weight)
        found[weight.name] = batch
        last[core.update_kind] = batch, size + core.basis_v.nbytes
    return {name: batch for name, batch in found.items() if len(batch) > 1}


def parent_of(module_name: str) -> str:
    return module_name.rpartition(".")[0]


def refuse_without_small_form(weights: Iterable[CheckpointWeight]) -> None:
    """Look before the first sync, which would send whole weights.  A vector has no smaller form and needs none.

    Raises:
        ValueError: naming the first such weights and what trains them.
    """
    whole = [w for w in weights if w.trained and len(w.shape) > 1 and not has_small_form(w)]
    if whole:
        shown = ", ".join(f"{w.name} ({type(w.layer).__name__ if w.layer else 'fully trained'})" for w in whole[:4])
        raise ValueError(
            f"sync_mode=factored sends small factors, and {len(whole)} trained weights have none: {shown}; use "
            "sync_mode=auto, which sends these whole, or sync_mode=dense"
        )


def has_small_form(weight: CheckpointWeight) -> bool:
    if weight.layer is None or weight.held_otherwise:
        return False
    with gathered(weight.layer, but=weight.layer.get_base_layer()):
        return small_factors(weight.layer) is not None


def refuse_beyond_float16(weights: Iterable[CheckpointWeight]) -> None:
    """Look before the first load: what float16 cannot hold becomes infinite in the engine, adapted or not.

    Raises:
        ValueError: naming the first such weights and their largest magnitudes.
    """
    limit = torch.finfo(torch.float16).max
    largest = {w.name: float(local(w.parameter).abs().max()) for w in weights if local(w.parameter).numel()}
    beyond = {name: size for name, size in largest.items() if size > limit}
    if beyond:
        shown = ", ".join(f"{name} ({size:.3g})" for name, size in list(beyond.items())[:4])
        raise ValueError(
            f"vllm_dtype=float16 holds numbers up to {limit:.0f}, and {len(beyond)} weights are larger: {shown}; serve "
            "in bfloat16 or float32"
        )


def refuse_non_finite(weights: Iterable[CheckpointWeight]) -> None:
    """Look before the load: a NaN would stay in the engine's key-value cache after the weights are mended.

    Raises:
        FloatingPointError: naming the first weight that a non-finite trained parameter reaches.
    """
    trained = [(weight.name, p) for weight in weights for p in weight.trained_parameters()]
    if all_finite([piece for _, p in trained if (piece := local(p)).numel()]):
        return
    name = next(name for name, p in trained if not local(p).isfinite().all())
    raise FloatingPointError(
        f"the trained parameters of {name} are not finite, so the policy diverged: lower learning_rate or max_grad_norm"
    )
