"""What an answer is made of: lists, tuples and intervals, unions, matrices, assignments, and leaves to be compared."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Leaf:
    """An expression, with the unit that followed it ("" for none, "%" for percent)."""

    text: str
    unit: str = ""


@dataclass(frozen=True)
class Text:
    """Words, compared as words."""

    words: str


@dataclass(frozen=True)
class Collection:
    """A list or set: order and repetition do not count."""

    items: tuple[Shape, ...]
    braces: bool = False


@dataclass(frozen=True)
class Ordered:
    """A tuple, vector or interval: brackets and order count.  `name` is the variable of an inequality."""

    opening: str
    items: tuple[Shape, ...]
    closing: str
    name: str = ""


@dataclass(frozen=True)
class Union:
    """A union of sets of numbers."""

    items: tuple[Shape, ...]


@dataclass(frozen=True)
class Matrix:
    rows: tuple[tuple[Shape, ...], ...]
    text: str = field(compare=False)


@dataclass(frozen=True)
class Assignment:
    """`name = value`: the name holds no number, so the value is the answer."""

    name: str
    value: Shape


@dataclass(frozen=True)
class Relation:
    """Sides and the relations between them: an equation with numbers on both sides, an inequality of expressions."""

    sides: tuple[str, ...]
    signs: tuple[str, ...]


@dataclass(frozen=True)
class Based:
    """Digits in an explicit base."""

    digits: str
    base: int


@dataclass(frozen=True)
class Ratio:
    """`3:4`, `1:2:3`; also a time of day, with "am", "pm" or "" as its half."""

    parts: tuple[str, ...]
    half: str = ""


Shape = Leaf | Text | Collection | Ordered | Union | Matrix | Assignment | Relation | Based | Ratio

INFINITE = {"-": Leaf(r"-\infty"), "+": Leaf(r"\infty")}
REALS = Ordered("(", (INFINITE["-"], INFINITE["+"]), ")")
EMPTY = Collection((), braces=True)


def all_but(point: Shape) -> Union:
    """Every real number but one."""
    return Union((Ordered("(", (INFINITE["-"], point), ")"), Ordered("(", (point, INFINITE["+"]), ")")))
