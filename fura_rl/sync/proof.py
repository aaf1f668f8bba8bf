"""The proof that a sync arrived: by an audit of the engine's kernels, by a probe of its log-probs.

What fails is sent once more before the run is stopped.  `weight_sync.py` says when which of the two is due; `audit.py`
and `probe.py` judge.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fura_rl.sync import expert_audit, probe
from fura_rl.sync.audit import Gain, KernelAudit, stale_modules
from fura_rl.sync.engine import RolloutEngine
from fura_rl.sync.expert_audit import expert_layers
from fura_rl.sync.fold import CheckpointWeight
from fura_rl.sync.remote_engine import Follower
from fura_rl.sync.sharding import failing_together, in_any_process
from fura_rl.sync.shared_audit import SharedKernels, worst_gains
from fura_rl.sync.transport import EngineLostError, NotKeptError, RemoteSyncError

logger = logging.getLogger(__name__)

SO_IT_STOPS = "Rollouts would come from another policy than the one trained, so the run stops here"


@dataclass(frozen=True)
class Delivery:
    """What a sync has sent, as its proof needs it."""

    weights: Mapping[str, CheckpointWeight]  # all of the policy's
    syncs: int  # since the last audit, this one too
    shared: bool  # whether every process audits the rows that it holds
    resend: Callable[[], None]  # sends it once more, and tells `SyncProof.audit` what it was not told the first time


class SyncProof:
    """Proves one delivery after another to one engine.

    Args:
        model: the policy.
        engine: what it was delivered to.
        token_ids: the fixed tokens of the probe, which both sides score; at least two.
        score: log-probs of token ids under the policy.
        tolerance: largest accepted gap of the probe in nats; None takes the default of the coarser dtype.
        compute_dtype: the dtype that the policy's forward runs in.
    """

    def __init__(
        self,
        model: nn.Module,
        engine: RolloutEngine,
        token_ids: Sequence[int],
        score: Callable[[nn.Module, Sequence[int]], torch.Tensor],
        tolerance: float | None,
        compute_dtype: torch.dtype,
    ) -> None:
        self.model = model
        self.engine = engine
        self.follows = isinstance(engine, Follower)  # another process of this trainer talks to the engine
        self.audit = KernelAudit()
        self.token_ids = list(token_ids)
        self.score = score
        self.compute_dtype = compute_dtype
        dtypes = {engine.dtype, compute_dtype, *(p.dtype for p in model.parameters() if p.dtype == torch.int8)}
        self.tolerance = tolerance or probe.default_tolerance(*dtypes)
        self._previous_logprobs: torch.Tensor | None = None

    # ---- by the audit

    def by_audit(self, delivery: Delivery) -> dict[str, Gain]:
        """The gains of the engine's kernels, all fresh; what is stale is sent once more before the run is stopped.

        Where it is shared, collective and with the same outcome in every process.

        Raises:
            StaleEngineError: naming the modules that did not take their weights twice, or once where they are not kept.
        """
        self._expect_of_experts(delivery)
        syncs = delivery.syncs
        own, gains = self._gains(delivery)
        if stale := stale_modules(gains):
            logger.warning("weight sync: %s did not take the new weights; sending them once more", ", ".join(stale))
            try:
                (SharedKernels(self.engine) if delivery.shared else self.engine).resend()
            except NotKeptError as error:
                raise probe.StaleEngineError(stale_message(stale, gains, syncs, f"once, and {error}")) from error
            own, gains = self._gains(delivery)
        if stale := stale_modules(gains):
            raise probe.StaleEngineError(stale_message(stale, gains, syncs))
        self.audit.accept(own)
        return gains

    def _expect_of_experts(self, delivery: Delivery) -> None:
        for layer in expert_layers(self.model, delivery.weights.values()):
            replies = layer.replies(self.engine.dtype)
            bases = None if all(map(self.audit.knows, layer.names)) else layer.base_replies()
            for expert, name in enumerate(layer.names):
                base = None if bases is None else bases[expert]
                self.audit.expect_reply(name, replies[expert], base, layer.spans, roundings=expert_audit.ROUNDINGS)

    def _gains(self, delivery: Delivery) -> tuple[dict[str, Gain], dict[str, Gain]]:
        """The gains of the engine's kernels at the rows that this process looks at, and the worst of all processes'."""
        if not delivery.shared:
            own = self.audit.gains(self.engine, delivery.syncs)
            return own, own
        with failing_together():
            own = self.audit.gains(SharedKernels(self.engine), delivery.syncs)
        return own, worst_gains(own)

    # ---- by the probe

    def expected(self) -> torch.Tensor:
        """The policy's log-probs of the probe; to be asked for before the engine may write where the policy lies."""
        return self.score(self.model, self.token_ids)

    def by_probe(self, delivery: Delivery, expected: torch.Tensor, gains: dict[str, Gain] | None) -> float | None:
        """The largest gap between the policy's log-probs of the probe, `expected`, and the engine's.

        `gains` are those of this delivery's audit, None where it had none.  Where an engine of any process fails, every
        process sends its weights once more before the run is stopped.

        Raises:
            StaleEngineError: where it fails twice, with the modules that an audit finds stale, due or not; where it
                fails once, if the weights cannot be sent again.
        """
        gap, failure = self._compare(expected)
        if in_any_process(failure is not None):
            if failure:
                logger.warning("%s. Sending the weights once more", failure)
            self._resend(delivery, failure)
            gap, failure = self._compare(expected)
            if in_any_process(failure is not None):
                with failing_together():
                    found = self._audit_words(delivery, gains) if delivery.shared or not self.follows else ""
                with failing_together():
                    if failure:
                        again = f"so they do after the weights were sent once more; {found}"
                        raise probe.StaleEngineError(f"{failure}; {again}. {SO_IT_STOPS}")
            logger.warning("weight sync: the probe is passed by the weights that were sent once more")
        self._previous_logprobs = expected
        return gap

    def _compare(self, expected: torch.Tensor) -> tuple[float | None, probe.StaleEngineError | None]:
        """The probe's gap, or what it fails by."""
        with failing_together():
            try:
                if self.follows:
                    return None, None
                gap = probe.check(
                    self.engine.prompt_logprobs(self.token_ids),
                    expected,
                    tolerance=self.tolerance,
                    previous=self._previous_logprobs,
                    engine_dtype=self.engine.dtype,
                    trainer_dtype=self.compute_dtype,
                )
            except probe.StaleEngineError as failure:
                return None, failure
            return gap, None

    def _resend(self, delivery: Delivery, failure: probe.StaleEngineError | None) -> None:
        """Raises StaleEngineError, of the `failure`, where the weights cannot be sent again."""
        with failing_together():
            try:
                delivery.resend()
            except (EngineLostError, RemoteSyncError) as lost:
                if failure is None:
                    raise
                raise probe.StaleEngineError(
                    f"{failure}. It could not be sent once more: {lost}. {SO_IT_STOPS}"
                ) from lost

    def _audit_words(self, delivery: Delivery, gains: dict[str, Gain] | None) -> str:
        """What an audit of the engine says.  Collective where it is shared."""
        stale: list[str] = []
        if gains is None:
            self._expect_of_experts(delivery)
            _, gains = self._gains(delivery)
            stale = stale_modules(gains)
        if stale:
            return f"an audit finds {len(stale)} of {len(gains)} modules stale: {shown_modules(stale, gains)}"
        if gains:
            return f"an audit finds none of {len(gains)} modules stale, so it is no weight that has not arrived"
        return "an audit finds no update that is large enough to judge a module by"


def stale_message(stale: list[str], gains: dict[str, Gain], syncs: int, sent: str = "twice") -> str:
    before = "the sync before" if syncs == 1 else f"one of the {syncs} syncs before, which were not audited"
    cause = (
        f"nothing of this sync arrived: the engine still serves the weights of {before}"
        if len(stale) == len(gains)
        else "these modules were skipped, or their kernels were not rebuilt"
    )
    return (
        f"weight sync failed its audit: {len(stale)} of {len(gains)} modules do not compute with the weights they were "
        f"sent, {sent}: {shown_modules(stale, gains)}. Gain 1 is fresh, 0 stale, nan no finite answer. Likely cause: "
        f"{cause}. {SO_IT_STOPS}"
    )


def shown_modules(stale: list[str], gains: dict[str, Gain]) -> str:
    shown = ", ".join(f"{name} (gain {gains[name].value:.2f})" for name in stale[:8])
    return shown + (f" and {len(stale) - 8} more" if len(stale) > 8 else "")
