"""Whether an answer equals the gold: shapes against shapes, down to leaves.

The ladder, cheapest first: the same string, exact values, words, structure, and only then `fallback`, which asks
sympy through math-verify.  Without a fallback the verdict may be None: the caller has to ask a worker.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise

from rewards import leaves
from rewards.algebra import Value
from rewards.expression import evaluate
from rewards.reading import is_name, readings
from rewards.shapes import (
    Assignment,
    Based,
    Collection,
    Leaf,
    Matrix,
    Ordered,
    Ratio,
    Relation,
    Shape,
    Text,
    Union,
)
from rewards.strictness import Strictness

Fallback = Callable[[str, str], bool | None]


@dataclass
class Comparison:
    """One comparison under way.  `decided_by` names the last rung that was needed."""

    strictness: Strictness
    tolerance: float = 0.0
    fallback: Fallback | None = None
    identity: bool = True  # whether the same string is the same answer; off when a gold is checked against itself
    decided_by: str = field(default="string", init=False)

    def compare(self, gold: str, answer: str) -> bool | None:
        """Whether any reading of the answer equals any reading of the gold; None where a fallback is needed."""
        return some(self.match(g, a) for g in readings(gold) for a in readings(answer))

    def match(self, gold: Shape, answer: Shape) -> bool | None:
        """Dispatch over the two shapes; pairs that are not in the table are different things."""
        if isinstance(answer, Assignment) and not isinstance(gold, Assignment | Relation):
            return self.match(gold, answer.value)
        if isinstance(gold, Assignment) and not isinstance(answer, Assignment | Relation):
            return self.match(gold.value, answer)
        for (left, right), compare in TABLE.items():
            if isinstance(gold, left) and isinstance(answer, right):
                return compare(self, gold, answer)
        return False

    def leaf(self, gold: Leaf, answer: Leaf) -> bool | None:
        self.note("exact")
        verdict = leaves.same_leaf(gold, answer, self.strictness, self.tolerance, self.identity)
        return self.ask(gold.text, answer.text) if verdict is None else verdict

    def ask(self, gold: str, answer: str) -> bool | None:
        self.note("math_verify")
        return self.fallback(gold, answer) if self.fallback else None

    def note(self, rung: str) -> None:
        if RUNGS.index(rung) > RUNGS.index(self.decided_by):
            self.decided_by = rung

    def text(self, gold: Text, answer: Text) -> bool:
        self.note("text")
        return gold.words == answer.words

    def unordered(self, gold: Collection | Union, answer: Collection | Union) -> bool | None:
        """Equal as sets: repetitions are dropped, then every item finds its partner."""
        self.note("structure")
        golds, answers = self.distinct(gold.items), self.distinct(answer.items)
        if golds is None or answers is None:
            return None
        if len(golds) != len(answers):
            return False
        rest, undecided = list(answers), False
        for item in golds:
            verdicts = [self.match(item, other) for other in rest]
            if True in verdicts:
                rest.pop(verdicts.index(True))
            elif None in verdicts:
                undecided = True
            else:
                return False
        return None if undecided else True

    def distinct(self, items: tuple[Shape, ...]) -> list[Shape] | None:
        """Without repetitions.  Only short lists are searched: others are compared as they stand."""
        if len(items) > 24:
            return list(dict.fromkeys(items))
        kept: list[Shape] = []
        for item in items:
            if some(quick_equal(other, item) for other in kept) is not True:
                kept.append(item)
        return kept

    def ordered(self, gold: Ordered, answer: Ordered) -> bool | None:
        self.note("structure")
        if len(gold.items) != len(answer.items):
            return False
        if len(gold.items) == 2 and (gold.opening, gold.closing) != (answer.opening, answer.closing):
            return False
        if gold.name and answer.name and gold.name != answer.name:
            return False
        return every(self.match(g, a) for g, a in zip(gold.items, answer.items, strict=True))

    def list_as_tuple(self, gold: Shape, answer: Shape) -> bool | None:
        """A list without brackets in the order of the tuple; intervals and sets are no tuples."""
        self.note("structure")
        listed, tupled = (gold, answer) if isinstance(gold, Collection) else (answer, gold)
        if listed.braces or tupled.name or (tupled.opening, tupled.closing) != ("(", ")"):
            return False
        if len(gold.items) != len(answer.items):
            return False
        return every(self.match(g, a) for g, a in zip(in_axis_order(gold), in_axis_order(answer), strict=True))

    def single(self, gold: Shape, answer: Shape) -> bool | None:
        """A set of one thing, written with or without its braces."""
        gold = gold.items[0] if isinstance(gold, Collection) and len(gold.items) == 1 else gold
        answer = answer.items[0] if isinstance(answer, Collection) and len(answer.items) == 1 else answer
        return False if isinstance(gold, Collection) or isinstance(answer, Collection) else self.match(gold, answer)

    def matrix(self, gold: Matrix, answer: Matrix) -> bool | None:
        self.note("structure")
        if [len(row) for row in gold.rows] != [len(row) for row in answer.rows]:
            return False
        pairs = zip((c for row in gold.rows for c in row), (c for row in answer.rows for c in row), strict=True)
        return every(self.match(g, a) for g, a in pairs)

    def matrix_expression(self, gold: Shape, answer: Shape) -> bool | None:
        """A matrix against an expression of matrices, such as a number times a matrix."""
        leaf, matrix = (gold, answer) if isinstance(gold, Leaf) else (answer, gold)
        if not isinstance(leaf, Leaf) or not isinstance(matrix, Matrix) or "matrix" not in leaf.text:
            return False
        return self.ask(matrix.text if matrix is gold else leaf.text, matrix.text if matrix is answer else leaf.text)

    def assignments(self, gold: Assignment, answer: Assignment) -> bool | None:
        self.note("structure")
        if gold.name == answer.name or "(" in gold.name + answer.name:
            return self.match(gold.value, answer.value)
        return self.relations(as_relation(gold), as_relation(answer))

    def relations(self, gold: Shape | None, answer: Shape | None) -> bool | None:
        """Two equations or inequalities: equal up to a constant factor, or what math-verify makes of them."""
        gold = as_relation(gold) if isinstance(gold, Assignment) else gold
        answer = as_relation(answer) if isinstance(answer, Assignment) else answer
        if not isinstance(gold, Relation) or not isinstance(answer, Relation):
            return False
        self.note("structure")
        if self.identity and gold.signs == answer.signs and squeezed(gold) == squeezed(answer):
            return True
        if len(gold.signs) != 1 or len(answer.signs) != 1:
            return every([self.chain(gold, None), self.chain(answer, None), self.leaf(last(gold), last(answer))])
        if not any(LETTER.search(side) for side in (*gold.sides, *answer.sides)):  # statements about numbers
            return every([self.leaf(last(gold), last(answer)), self.chain(answer, None)])
        (g_left, g_sign, g_right), (a_left, a_sign, a_right) = upright(gold), upright(answer)
        if g_sign != a_sign:
            return False
        verdict = leaves.proportional(
            f"({g_left})-({g_right})", f"({a_left})-({a_right})", positive=g_sign not in ("=", r"\ne")
        )
        return self.ask(f"{g_left} {g_sign} {g_right}", f"{a_left} {a_sign} {a_right}") if verdict is None else verdict

    def chain_answer(self, gold: Shape, answer: Relation) -> bool | None:
        return self.chain(answer, gold)

    def chain_gold(self, gold: Relation, answer: Shape) -> bool | None:
        return self.chain(gold, answer)

    def chain(self, relation: Relation, other: Shape | None) -> bool | None:
        """`x = 3 + 4 = 7`: worth its last side where the sides after the name are equal, and not the same words."""
        self.note("structure")
        if set(relation.signs) != {"="}:
            return False
        sides = list(relation.sides)
        while len(sides) > 1 and is_name(sides[0]):
            sides.pop(0)
        words = [leaves.squeeze(side) for side in sides]
        if len(set(words)) != len(words) or not all(words):
            return False
        equal = every(self.leaf(Leaf(a), Leaf(b)) for a, b in pairwise(sides))
        return equal if other is None or not equal else some(self.match(shape, other) for shape in readings(sides[-1]))

    def based(self, gold: Based, answer: Based) -> bool:
        self.note("exact")
        return gold == answer

    def based_gold(self, gold: Based, answer: Leaf) -> bool:
        """`1011` for `1011_2`: the base was asked for, so its digits are the answer."""
        self.note("exact")
        return leaves.squeeze(answer.text).lstrip("0") == gold.digits

    def based_answer(self, gold: Leaf, answer: Based) -> bool | None:
        """Another base than ten is the number of the question, not its value."""
        return self.leaf(gold, Leaf(answer.digits)) if answer.base == 10 else False

    def ratios(self, gold: Ratio, answer: Ratio) -> bool | None:
        """Equal part by part; as ratios up to a factor, as times of day not."""
        self.note("structure")
        if len(gold.parts) != len(answer.parts) or (gold.half and answer.half and gold.half != answer.half):
            return False
        same = every(self.leaf(Leaf(g), Leaf(a)) for g, a in zip(gold.parts, answer.parts, strict=True))
        if same is not False or is_clock(gold) or is_clock(answer):
            return same
        values = [[evaluate(part) for part in ratio.parts] for ratio in (gold, answer)]
        numbers = [[v.rational if isinstance(v, Value) else None for v in row] for row in values]
        if any(number is None for row in numbers for number in row):
            return False
        (g, a) = ([Fraction(n or 0) for n in row] for row in numbers)
        return all(x * a[0] == y * g[0] for x, y in zip(g, a, strict=True)) and g[0] != 0 != a[0]

    def ratio_as_fraction(self, gold: Shape, answer: Shape) -> bool | None:
        sides = [
            Leaf(rf"\frac{{{s.parts[0]}}}{{{s.parts[1]}}}") if isinstance(s, Ratio) and len(s.parts) == 2 else s
            for s in (gold, answer)
        ]
        return self.leaf(*sides) if all(isinstance(s, Leaf) for s in sides) else False


LETTER = re.compile(
    r"(?<![\\A-Za-z])[A-Za-z]|\\(?:theta|alpha|beta|gamma|lambda|phi|omega|mu|sigma|rho|tau|delta)(?![a-z])"
)
RUNGS = ("string", "text", "exact", "structure", "math_verify")
C = Comparison
TABLE: dict[tuple[type, type], Callable[..., bool | None]] = {
    (Leaf, Leaf): C.leaf,
    (Text, Text): C.text,
    (Collection | Union, Collection | Union): C.unordered,
    (Ordered, Ordered): C.ordered,
    (Ordered, Collection): C.list_as_tuple,
    (Collection, Ordered): C.list_as_tuple,
    (Matrix, Matrix): C.matrix,
    (Matrix, Leaf): C.matrix_expression,
    (Leaf, Matrix): C.matrix_expression,
    (Assignment, Assignment): C.assignments,
    (Relation | Assignment, Relation | Assignment): C.relations,
    (Based, Based): C.based,
    (Based, Leaf): C.based_gold,
    (Leaf, Based): C.based_answer,
    (Ratio, Ratio): C.ratios,
    (Ratio, Leaf): C.ratio_as_fraction,
    (Leaf, Ratio): C.ratio_as_fraction,
    (Collection, object): C.single,
    (object, Collection): C.single,
    (object, Relation): C.chain_answer,
    (Relation, object): C.chain_gold,
}


def some(verdicts: object) -> bool | None:
    """True where one is, None where one is undecided, else False.  Stops at the first True."""
    undecided = False
    for verdict in verdicts:  # type: ignore[attr-defined]
        if verdict:
            return True
        undecided |= verdict is None
    return None if undecided else False


def every(verdicts: object) -> bool | None:
    """False where one is, None where one is undecided, else True.  Stops at the first False."""
    undecided = False
    for verdict in verdicts:  # type: ignore[attr-defined]
        if verdict is False:
            return False
        undecided |= verdict is None
    return None if undecided else True


def quick_equal(left: Shape, right: Shape) -> bool | None:
    if isinstance(left, Leaf) and isinstance(right, Leaf) and left.unit == right.unit:
        a, b = evaluate(left.text), evaluate(right.text)
        return a == b if isinstance(a, Value) and isinstance(b, Value) else left == right
    return left == right


def as_relation(assignment: Assignment) -> Relation | None:
    if isinstance(assignment.value, Leaf):
        return Relation((assignment.name, assignment.value.text), ("=",))
    return None


def in_axis_order(shape: Collection | Ordered) -> tuple[Shape, ...]:
    """`y = 2, x = 1` as the point (1, 2); other names stay in the order they are given."""
    items = shape.items
    if all(isinstance(item, Assignment) and item.name in ("x", "y", "z") for item in items):
        return tuple(sorted(items, key=lambda item: item.name))
    return items


def squeezed(relation: Relation) -> list[str]:
    return [leaves.squeeze(side) for side in relation.sides]


def last(relation: Relation) -> Leaf:
    return Leaf(relation.sides[-1])


def upright(relation: Relation) -> tuple[str, str, str]:
    """Sides and sign, with the smaller side first."""
    (left, right), (sign,) = relation.sides, relation.signs
    if sign in (">", r"\ge"):
        return right, "<" if sign == ">" else r"\le", left
    return left, sign, right


def is_clock(ratio: Ratio) -> bool:
    return bool(ratio.half) or any(part.startswith("0") and len(part) == 2 for part in ratio.parts[1:])
