"""What the verifier tells about itself at every step, and when it raises its voice."""

from __future__ import annotations

import logging
import statistics
from collections import Counter, deque
from collections.abc import Sequence

from rewards import grading
from rewards.result import STATUSES, Result

logger = logging.getLogger(__name__)

ALARM_FRAC = 0.01
WINDOW = 1_000  # items that a share is taken over
FEWEST = 100  # below this many items one timeout is no share
BROKEN = ("timeout", "memory", "crashed")
_windows: dict[str, deque[str]] = {}


def metrics(results: Sequence[Result]) -> dict[str, float]:
    """Shares of every status, times per item, and the state of the workers."""
    counts = Counter(result.status for result in results)
    seconds = sorted(result.seconds for result in results)
    counters = grading.default_pool().counters
    return {
        **{f"{status}_frac": counts[status] / len(results) for status in STATUSES},
        "seconds_p50": statistics.median(seconds),
        "seconds_p99": seconds[min(len(seconds) - 1, int(0.99 * len(seconds)))],
        "worker_kills": float(counters.kills),
        "worker_crashes": float(counters.crashes),
        "worker_unconfined": float(bool(counters.unconfined)),
        "worker_rss_mib": counters.rss_bytes / 2**20,
    }


def watch(results: Sequence[Result], name: str) -> list[str]:
    """Warn where over 1% of the latest items timed out or crashed, or where no answer of a batch could be read.

    A policy that discovers answers that hang the verifier shows here; so does a prompt that asks for another format.
    Returns the warnings.
    """
    window = _windows.setdefault(name, deque(maxlen=WINDOW))
    window.extend(result.status for result in results)
    warnings = []
    broken = Counter(status for status in window if status in BROKEN)
    if len(window) >= FEWEST and broken.total() > ALARM_FRAC * len(window):
        shares = ", ".join(f"{count} {status}" for status, count in broken.items())
        example = next((result.answer for result in results if result.status in BROKEN), None)
        shown = f"; one answer was {example[:80]!r}" if example else ""
        warnings.append(f"{name}: {shares} among the last {len(window)} items, over {ALARM_FRAC:.0%}{shown}")
        window.clear()
    if results and all(result.status in ("unparseable", "gold_unparseable") for result in results):
        warnings.append(
            f"{name}: none of {len(results)} items could be read ({results[0].status}, {results[0].decided_by}; answer "
            f"{(results[0].answer or '')[:80]!r}); check the prompt's answer format and the gold column"
        )
    for warning in warnings:
        logger.warning(warning)
    return warnings
