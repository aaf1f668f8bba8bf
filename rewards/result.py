"""What grading an item gives: a status, the answer that was read, how it was decided, and how long it took."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Status = Literal[
    "correct",  # the only status that pays
    "incorrect",
    "no_answer",  # no closed box (and, in an evaluation, no "answer is" either)
    "truncated",  # no answer, and the completion ends inside a thinking block or a box, or was cut
    "ambiguous",  # more distinct boxes than the mode allows
    "too_long",  # the answer is longer than the mode allows
    "unparseable",  # nothing that can be compared stands in the box
    "gold_unparseable",  # nothing that can be compared stands in the gold: a fault of the dataset
    "timeout",  # the worker gave the item up, or was killed over it, or the caller's budget was spent
    "memory",  # the worker ran into its memory limit
    "crashed",  # the worker died
]
STATUSES: tuple[str, ...] = get_args(Status)


@dataclass(frozen=True)
class Item:
    """A completion and its gold.

    `gold` is a bare answer or a worked solution with a boxed one; `truncated` says that the completion hit its length
    limit; `tolerance` is the relative error that the dataset allows.
    """

    completion: object  # a string or a list of chat messages
    gold: str
    truncated: bool = False
    tolerance: float = 0.0


@dataclass(frozen=True)
class Result:
    """The verdict on an item."""

    status: Status
    answer: str | None = None  # content of the last closed box, cut at the mode's limit
    source: str | None = None  # "box", or "phrase" where it was read from "the answer is ..."
    decided_by: str = ""  # string, text, exact, structure, math_verify; for the other statuses what went wrong
    seconds: float = 0.0  # from hand-over to verdict, in the process that decided

    @property
    def correct(self) -> bool:
        return self.status == "correct"

    @property
    def reward(self) -> float:
        """1.0 for `correct`, else 0.0."""
        return float(self.correct)
