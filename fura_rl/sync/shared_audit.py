"""The audit of a policy that is cut up over processes: each judges the rows that it holds, one speaks to the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist

from fura_rl.sync.audit import Gain, KernelReply, worst
from fura_rl.sync.engine import RolloutEngine
from fura_rl.sync.factors import Span
from fura_rl.sync.sharding import failing_together, of_every_process


class SharedKernels:
    """An engine's kernels as every process of the trainer may ask them; collective.

    Args:
        engine: the engine; process 0's is the one that is asked, once for all.
    """

    def __init__(self, engine: RolloutEngine) -> None:
        self.engine = engine
        self.dtype = engine.dtype

    def kernel_replies(self, spans: Mapping[str, Sequence[Span]]) -> list[dict[str, KernelReply]]:
        """As `audit.Kernels`: the replies to this process's own `spans`.

        Raises:
            PeerFailedError: where process 0 could not ask.
        """
        asked = of_every_process({name: list(part) for name, part in spans.items()})
        names = dict.fromkeys(name for part in asked for name in part)
        everything = {name: [span for part in asked for span in part.get(name, ())] for name in names}
        replies: list[Any] = [None]
        with failing_together():
            if dist.get_rank() == 0:
                replies = [self.engine.kernel_replies(everything)]
        dist.broadcast_object_list(replies, src=0)
        before = asked[: dist.get_rank()]
        return [
            {name: part_of(worker[name], spans[name], before, name) for name in spans if name in worker}
            for worker in replies[0]
        ]

    def resend(self) -> None:
        """Bring the engine to the last version once more; where that fails, it fails everywhere."""
        with failing_together():
            self.engine.resend()


def part_of(
    reply: KernelReply, spans: Sequence[Span], before: Sequence[Mapping[str, Sequence[Span]]], name: str
) -> KernelReply:
    """What of `reply` is of `spans`, which come after those that the processes `before` asked of `name`."""
    first = sum(map(feature_count, (part.get(name, ()) for part in before)))
    own = slice(first, first + feature_count(spans))
    return KernelReply(reply.output[:, own], reply.covered[:, own], reply.eps)


def feature_count(spans: Sequence[Span]) -> int:
    return sum(last - first for first, last in spans)


def worst_gains(gains: Mapping[str, Gain]) -> dict[str, Gain]:
    """By name the worst gain that a process found; the same in all of them.  Collective."""
    found: dict[str, list[Gain]] = {}
    for part in of_every_process(dict(gains)):
        for name, gain in part.items():
            found.setdefault(name, []).append(gain)
    return {name: worst(values) for name, values in found.items()}
