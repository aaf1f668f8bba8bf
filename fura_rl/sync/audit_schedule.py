"""Which syncs are audited: every N-th, or as many as the rollouts between them pay for."""

from __future__ import annotations

import logging
import math

logger = logging.getLogger(__name__)

ROLLOUT_SHARE = 0.05  # of the rollouts' time, what audits may take
SMALL_COST_SECONDS = 0.25  # too little to be worth a blind spot; keeps what a small run logs from depending on timing


def pays(cost_seconds: float, rollout_seconds: float) -> bool:
    """Whether rollouts of that long cover an audit that costs so much."""
    return cost_seconds < SMALL_COST_SECONDS or cost_seconds <= ROLLOUT_SHARE * rollout_seconds


def syncs_per_audit(cost_seconds: float, rollout_seconds_per_sync: float) -> int:
    """The least number of syncs whose rollouts cover an audit."""
    return max(1, math.ceil(cost_seconds / (ROLLOUT_SHARE * rollout_seconds_per_sync)))


class AuditSchedule:
    """When the next audit is due, in one process of the trainer.

    Rollouts are told as their seconds in total so far, and the cost of an audit is taken to be that of the last one.

    Args:
        every: N for every N-th sync, 0 for none, None for every sync by which rollouts have paid for an audit since the
            last one.  The first sync is audited except with 0.
    """

    def __init__(self, every: int | None) -> None:
        self.every = every
        self._cost_seconds: float | None = None  # of the last audit
        self._rollouts_then = 0.0  # in total, at the last audit
        self._told = False

    def due(self, version: int, first: bool, rollout_seconds: float, syncs: int) -> bool:
        """Whether the sync after `version`, the last of so many `syncs` since an audit, is audited; always the `first`
        of a policy that nothing is proved of."""
        if self.every is not None:
            return self.every > 0 and (first or version % self.every == 0)
        if first or self._cost_seconds is None:
            return True
        since = rollout_seconds - self._rollouts_then
        due = pays(self._cost_seconds, since)
        if not due and since > 0 and not self._told:
            self._tell(since / syncs)
        return due

    def audited(self, cost_seconds: float, rollout_seconds: float) -> None:
        """Note that the sync was audited, and what that cost."""
        self._cost_seconds, self._rollouts_then = cost_seconds, rollout_seconds

    def _tell(self, per_sync: float) -> None:
        self._told = True
        logger.warning(
            "weight sync: an audit of the engine takes %.2f s, more than %.0f%% of the %.2f s of rollouts between two "
            "syncs: one in %d syncs is audited; sync_audit_every=1 audits each",
            self._cost_seconds, 100 * ROLLOUT_SHARE, per_sync, syncs_per_audit(self._cost_seconds, per_sync),
        )  # fmt: skip
