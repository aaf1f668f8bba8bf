"""Takes a normalised answer apart into shapes, without any algebra.

Brackets, commas and relations, which a grammar of LaTeX reads slowly and sometimes wrongly, are gone when the leaves
are compared.
"""

from __future__ import annotations

import functools
import re
from fractions import Fraction

from rewards.algebra import ONE, Value
from rewards.expression import evaluate
from rewards.latex import normalise, scan, split_top, unwrap
from rewards.shapes import (
    EMPTY,
    INFINITE,
    REALS,
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
    all_but,
)
from rewards.texts import as_constant, as_text
from rewards.units import split_unit

MAX_ITEMS, MAX_NESTING = 400, 16
NUMBER_WORDS = dict(
    zip(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"],
        map(str, range(13)),
        strict=True,
    )
)
BASES = {
    "two": 2,
    "three": 3,
    "four": 4,
    "five": 5,
    "six": 6,
    "seven": 7,
    "eight": 8,
    "nine": 9,
    "ten": 10,
    "twelve": 12,
}
BRACKETS = {"(": ")", "[": "]", r"\{": r"\}", r"\langle": r"\rangle"}
RELATIONS = frozenset({"=", "<", ">", r"\le", r"\ge", r"\ne", r"\approx", r"\in", r"\Rightarrow", r"\equiv"})
FLIPPED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}
CONNECTOR = re.compile(r",?\s*\\text\s*\{\s*,?\s*(and|or)\s*,?\s*\}|,?(?<![A-Za-z\\])\s*\b(and|or)\b(?![A-Za-z])")
NAME = re.compile(  # possessive throughout: what one alternative took, no other may take again
    r"(?:[A-Za-z+*/:()\[\]|',\s{}^]|\\[A-Za-z]++|_\s*+(?:\{[A-Za-z0-9, \\]++\}|[A-Za-z0-9])|-(?=\s*+[A-Za-z\\]))++"
)
MATRIX = re.compile(r"\\begin\{([pbvBV]?matrix|array)\}(?:\{[lcr|]*\})?(.*)\\end\{\1\}", re.DOTALL)
SET_BUILDER = re.compile(r"\\\{\s*[A-Za-z](?:\s*\\in\s*(?:\\mathbb\{R\}|R))?\s*(?:\||:)\s*(.*)\\\}", re.DOTALL)
WITHOUT = re.compile(r"(?:\\mathbb\{R\})\s*(?:\\setminus|\\backslash|-)\s*\\\{(.*)\\\}", re.DOTALL)
BASED = re.compile(r"([0-9A-Fa-f]*\d[0-9A-Fa-f]*|[A-F]+)\s*_\s*\{?\s*(?:\\text\s*\{\s*)?(\d{1,2}|[a-z]+)\s*\}?\s*\}?")
RATIO = re.compile(r"[^:]{1,40}(?::[^:]{1,40}){1,5}")
HALF_DAY = re.compile(r"\s*(?:\\text\s*\{)?\s*([ap])\.?\s?m\.?,?\s*\}?$", re.IGNORECASE)
ABSOLUTE = re.compile(r"\|\s*([A-Za-z])\s*\|")
LETTER_LIST = re.compile(r"[A-Z](?:\s*(?:,|and|,\s*and)\s*[A-Z])+")
PLAIN_WORD = re.compile(r"[A-Za-z]{4,}")  # a word, not a product of letters
MEANING = re.compile(r"[^\W_]")  # without a letter or a digit nothing is said
CHOICE = re.compile(
    r"(?:\\text\s*\{)?\s*(?:\(([A-Z])\)\s*\}?\s*[:.]?|([A-Z])(?:\)|\.(?=\s))\s*\}?)\s*(\S.*)", re.DOTALL
)


@functools.lru_cache(maxsize=8_192)
def readings(text: str) -> tuple[Shape, ...]:
    """Every way to read the content of a box; most have one.  `10,000` is a number and a list, `(C) 12` a choice.

    Empty where nothing is there, or where the nesting or the number of items is beyond all answers.
    """
    text = normalise(text)
    if not text:
        return ()
    found: list[Shape | None] = []
    choice = CHOICE.fullmatch(text)
    if choice and not re.match(r"[-+*/^,}=<>]", choice.group(3)):
        found += [Text((choice.group(1) or choice.group(2)).lower()), read(choice.group(3))]
    if re.fullmatch(
        r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?(?:\s*(?:\\%|\\text\s*\{[^{}]*\}))?|\\\$\s*\d{1,3}(,\d{3})+(\.\d+)?", text
    ):
        found.append(read_leaf(text))
        elements = text.split(",")
        if all(re.fullmatch(r"[-+]?[1-9]\d*", element) for element in elements):
            found.append(Collection(tuple(Leaf(element) for element in elements)))
    else:
        words = as_text(text)
        found += [Text(words)] if words else []
        if text.lower() in NUMBER_WORDS:
            found.append(Leaf(NUMBER_WORDS[text.lower()]))
        elif not (words and PLAIN_WORD.fullmatch(text)):
            found.append(read(text) if MEANING.search(text) or as_constant(text) else None)
    return tuple(dict.fromkeys(shape for shape in found if shape is not None))


def read(text: str, nesting: int = 0) -> Shape | None:
    """One normalised answer, or part of one, as a shape."""
    text = unwrap(text)
    if not text or nesting > MAX_NESTING:
        return None
    for reader in (read_constant, read_matrix, read_set_builder, read_union, read_list, read_relation, read_brackets):
        shape = reader(text, nesting)
        if shape is not None:
            return shape
    return read_leaf(text)


def read_constant(text: str, nesting: int) -> Shape | None:
    name = as_constant(text)
    if name in (r"\emptyset", r"\{\}"):
        return EMPTY
    if name == r"\mathbb{R}":
        return REALS
    inner = re.fullmatch(r"\\text\s*\{([^{}]*)\}", text)
    if inner is None:
        return None
    content = inner.group(1).strip()
    if content.lower() in NUMBER_WORDS:
        return Leaf(NUMBER_WORDS[content.lower()])
    if re.search(r"\d|\\infty", content) or len(content) == 1 or LETTER_LIST.fullmatch(content):
        return read(normalise(content), nesting + 1)
    words = as_text(text)
    return Text(words) if words else None


def read_matrix(text: str, nesting: int) -> Shape | None:
    match = MATRIX.fullmatch(text)
    if match is None or match.group(1) in ("vmatrix", "Vmatrix") or r"\begin" in match.group(2):
        return None
    rows = [row for row in re.split(r"\\\\(?:\[[^\]]*\])?", match.group(2).replace(r"\hline", "")) if row.strip()]
    cells = [[read(cell, nesting + 1) for cell in row.split("&")] for row in rows]
    if sum(map(len, cells)) > MAX_ITEMS or any(cell is None for row in cells for cell in row):
        return None
    return Matrix(tuple(tuple(cell for cell in row if cell is not None) for row in cells), text)


def read_set_builder(text: str, nesting: int) -> Shape | None:
    without = WITHOUT.fullmatch(text)
    if without:
        point = read(without.group(1), nesting + 1)
        return all_but(point) if isinstance(point, Leaf) else None
    match = SET_BUILDER.fullmatch(text)
    return read(match.group(1), nesting + 1) if match else None


def read_union(text: str, nesting: int) -> Shape | None:
    pieces = [piece for _, piece in split_top(text, lambda token: token == r"\cup")]
    if len(pieces) < 2:
        return None
    name = re.match(r"\s*[A-Za-z](?:_\w)?\s*\\in\b", pieces[0])
    pieces[0] = pieces[0][name.end() :] if name else pieces[0]
    items = read_all(pieces, nesting)
    return Union(items) if items else None


def read_list(text: str, nesting: int) -> Shape | None:
    """A list by commas or connectors; inequalities joined by "or" are a union, two joined by "and" an interval."""
    kinds: list[str] = []

    def note(match: re.Match[str]) -> str:
        kinds.append(match.group(1) or match.group(2))
        return " , "

    plain = CONNECTOR.sub(note, text) if "and" in text or "or" in text else text
    separators = ";" if len(split_top(plain, lambda token: token == ";")) > 1 else ","  # p=5,q=2; p=7,q=2
    pieces = [piece for _, piece in split_top(plain, lambda token: token == separators) if piece.strip()]
    if len(pieces) < 2:
        return None
    items = read_all(pieces, nesting)
    if not items:
        return None
    ranges = [item for item in items if isinstance(item, Ordered | Union) and getattr(item, "name", "")]
    if len(ranges) == len(items):
        if "or" in kinds:
            return Union(items)
        if len(items) == 2:
            return intersect(items) or Collection(items)
    return Collection(items)


def intersect(items: tuple[Shape, ...]) -> Shape | None:
    """`x > 2` and `x < 3` as one interval; None for anything but two half-lines that face each other."""
    for low, high in (items, items[::-1]):
        if not isinstance(low, Ordered) or not isinstance(high, Ordered) or low.name != high.name:
            continue
        if low.items[1] == INFINITE["+"] and high.items[0] == INFINITE["-"]:
            return Ordered(low.opening, (low.items[0], high.items[1]), high.closing, low.name)
    return None


def read_all(pieces: list[str], nesting: int) -> tuple[Shape, ...]:
    """The shapes of all pieces; none where one of them cannot be read or there are too many."""
    if len(pieces) > MAX_ITEMS:
        return ()
    items = [read(piece, nesting + 1) for piece in pieces]
    return tuple(item for item in items if item is not None) if all(items) else ()


def read_relation(text: str, nesting: int) -> Shape | None:
    pieces = split_top(text, RELATIONS.__contains__)
    if len(pieces) < 2:
        return None
    signs = tuple(sign for sign, _ in pieces[1:])
    sides = tuple(unwrap(side) for _, side in pieces)
    if signs == (r"\approx",):
        return read(sides[1] if not sides[0] or is_name(sides[0]) else sides[0], nesting + 1)
    if signs[0] in (r"\in", r"\approx", r"\Rightarrow", "=") and not sides[0]:
        return read(text[text.index(signs[0]) + len(signs[0]) :], nesting + 1)
    if signs == (r"\in",) and is_name(sides[0]):
        return read(sides[1], nesting + 1)
    if set(signs) <= {"=", r"\approx"}:
        return read_equation(sides, signs, nesting)
    return read_inequality(sides, signs, nesting)


def read_equation(sides: tuple[str, ...], signs: tuple[str, ...], nesting: int) -> Shape | None:
    if signs[-1] == r"\approx":  # x = \sqrt{2} \approx 1.41: the exact side counts
        sides, signs = sides[:-1], signs[:-1]
    if len(sides) == 2 and set(signs) == {"="}:
        name, value = (sides[1], sides[0]) if is_name(sides[1]) and not is_name(sides[0]) else sides
        if is_name(name):
            shape = read(value, nesting + 1)
            return Assignment(canonical_name(name), shape) if shape is not None else None
    return Relation(sides, signs)


def solve_linear(sides: tuple[str, ...], sign: str) -> tuple[tuple[str, ...], str]:
    """`-2x > 6` as `x < -3`, where one letter stands there to the first power; anything else as it is."""
    value = evaluate(f"({sides[0]})-({sides[1]})")
    if not isinstance(value, Value) or len(value.letters) != 1 or value.below != ONE:
        return sides, sign
    [letter] = value.letters
    slope, rest = value.above.get(((letter, Fraction(1)),)), value.above.get((), Fraction(0))
    if slope is None or "^" in letter or value.above.keys() - {()} != {((letter, Fraction(1)),)}:
        return sides, sign
    return (letter, str(-rest / slope)), sign if slope > 0 else FLIPPED.get(sign, sign)


def read_inequality(sides: tuple[str, ...], signs: tuple[str, ...], nesting: int) -> Shape | None:
    """`0 <= x < 1`, `x >= 3` and `|x| < 2` as intervals; other inequalities stay relations."""
    distance = ABSOLUTE.fullmatch(sides[0])
    if distance and len(sides) == 2 and signs[0] in ("<", r"\le"):
        sides, signs = (f"-({sides[1]})", distance.group(1), sides[1]), signs * 2
    shape = half_line(sides, signs[0], nesting) if len(sides) == 2 else between(sides, signs, nesting)
    return shape or Relation(sides, signs)


def half_line(sides: tuple[str, ...], sign: str, nesting: int) -> Shape | None:
    """`x < b`, `b > x`, `2x < 2b`, `x != b`; None for anything but a name and a bound."""
    if not (is_name(sides[0]) or is_name(sides[1])):
        sides, sign = solve_linear(sides, sign)
    if is_name(sides[1]) and not is_name(sides[0]) and sign in FLIPPED:
        sides, sign = sides[::-1], FLIPPED[sign]
    bound = read(sides[1], nesting + 1)
    if not is_name(sides[0]) or is_name(sides[1]) or not isinstance(bound, Leaf):
        return None
    name = canonical_name(sides[0])
    if sign in ("<", r"\le"):
        return Ordered("(", (INFINITE["-"], bound), ")" if sign == "<" else "]", name)
    if sign in (">", r"\ge"):
        return Ordered("(" if sign == ">" else "[", (bound, INFINITE["+"]), ")", name)
    return all_but(bound) if sign == r"\ne" else None


def between(sides: tuple[str, ...], signs: tuple[str, ...], nesting: int) -> Shape | None:
    """`a <= x < b`, in either direction; None for anything but a name between two bounds."""
    if set(signs) <= {">", r"\ge"}:
        sides, signs = sides[::-1], tuple(FLIPPED[sign] for sign in signs[::-1])
    if len(sides) != 3 or not set(signs) <= {"<", r"\le"} or not is_name(sides[1]):
        return None
    low, high = read(sides[0], nesting + 1), read(sides[2], nesting + 1)
    if not isinstance(low, Leaf) or not isinstance(high, Leaf):
        return None
    brackets = "(" if signs[0] == "<" else "[", ")" if signs[1] == "<" else "]"
    return Ordered(brackets[0], (low, high), brackets[1], canonical_name(sides[1]))


def is_name(side: str) -> bool:
    """Whether a side of a relation names what is asked for: letters, `f(x)`, `a + b`, words; no number in it."""
    bare = re.sub(r"\\text\s*\{[^{}]*\}", "x", side)
    if not NAME.fullmatch(bare) or bare in ("e", "i") or bare.startswith("-"):
        return False
    return not re.search(r"\\(?:pi|infty|sqrt|sum|int|prod|lim)(?![A-Za-z])", bare)


def canonical_name(side: str) -> str:
    return re.sub(r"[\s{}]|\\text", "", side)


def read_brackets(text: str, nesting: int) -> Shape | None:
    """Brackets round the whole: one item in them is that item, more are a tuple, an interval or a set."""
    tokens = list(scan(text))
    opening, closing = tokens[0][0], tokens[-1][0]
    if opening not in BRACKETS or closing not in BRACKETS.values() or tokens[-1][3] != 0 or closing == "}":
        return None
    if any(depth == 0 for _, _, _, depth in tokens[1:-1]):
        return None
    inner = text[tokens[0][2] : tokens[-1][1]]
    pieces = [piece for _, piece in split_top(inner, lambda token: token in (",", ";"))]
    if not inner.strip():
        return EMPTY if opening == r"\{" else None
    if opening == r"\{":
        listed = read(inner, nesting + 1)
        items = listed.items if isinstance(listed, Collection) and not listed.braces else (listed,) if listed else ()
        return Collection(items, braces=True) if items else None
    if len(pieces) == 1:
        return read(inner, nesting + 1) if opening != r"\langle" and BRACKETS[opening] == closing else None
    items = read_all(pieces, nesting)
    if not items:
        return None
    opening, closing = ("(", ")") if opening == r"\langle" else (opening, closing)
    opening = "(" if items[0] == INFINITE["-"] else opening
    closing = ")" if items[-1] == INFINITE["+"] else closing
    return Ordered(opening, items, closing)


def read_leaf(text: str) -> Shape:
    """What is left: `\\pm` gives two, a base, a ratio or a time is taken as such, a unit comes off."""
    if r"\pm" in text or r"\mp" in text:
        signs = [(r"\pm", r"\mp"), ("+", "-"), ("-", "+")]
        plus, minus = (unwrap(text.replace(r"\pm", a).replace(r"\mp", b)) for a, b in signs[1:])
        return Collection((read_leaf(plus), read_leaf(minus)))
    based = BASED.fullmatch(text)
    if based:
        base = BASES.get(based.group(2)) or (int(based.group(2)) if based.group(2).isdigit() else 0)
        digits = based.group(1).upper().lstrip("0") or "0"
        if 2 <= base <= 36 and all(int(digit, 36) < base for digit in digits):
            return Based(digits, base)
    half = HALF_DAY.search(text)
    clock = text[: half.start()] if half else text
    if RATIO.fullmatch(clock) and "{:" not in clock:
        return Ratio(tuple(part.strip() for part in clock.split(":")), f"{half.group(1).lower()}m" if half else "")
    quantity = split_unit(re.sub(r"^\s*\\infty$|^\s*\+\s*\\infty$", r"\\infty", text))
    return Leaf(unwrap(quantity.number), quantity.unit)
