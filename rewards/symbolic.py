r"""The last rung, in worker processes only: math-verify reads both sides, then guards decide what it may not.

Two numbers, or two expressions, are compared by value at high precision: math-verify's own comparison rounds to six
decimals and calls `1.6 \times 10^{-19}` and `1.7 \times 10^{-19}` equal.  Sets, relations and matrices go to
`math_verify.verify`.  Both sides are wrapped in a box before they are parsed: a bare gold `3\sqrt{13}` is read as 3.
Read in math-verify 0.9.0 and latex2sympy2_extended 1.11.0; only public names are used.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import Any

from rewards.latex import brace_arguments
from rewards.leaves import DECIMAL

DEGREES, RADIANS = re.compile(r"(\d+(?:\.\d+)?)\s*\^\{\\circ\}"), r"(\\frac{\1\\pi}{180})"
DIGITS = 50
SAME = 1e-40  # relative difference of equal numbers at 50 digits
POINTS = ((37, 29), (611, 47), (19, 7), (5, 11), (83, 31), (13, 23), (409, 17), (3, 13))  # for letters, in turn
STEPS = 30  # whole numbers that functions with steps are compared at besides: two of them agree at many points


class UnparseableError(Exception):
    """math-verify cannot read the answer, or (`is_gold`) the gold."""

    def __init__(self, text: str, is_gold: bool) -> None:
        super().__init__(text)
        self.is_gold = is_gold


@functools.cache
def extraction_config() -> tuple[Any, ...]:
    """Boxes only; units and equations as they are, so that no letter is eaten as a unit in silence."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig

    normalization = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="last", equations=False
    )
    return (
        LatexExtractionConfig(
            boxed_match_priority=0, try_extract_without_anchor=False, normalization_config=normalization
        ),
    )


@functools.lru_cache(maxsize=4_096)
def parse(text: str) -> Any:
    """The sympy object of an expression, or None.  `i` is the imaginary unit, decimals are exact."""
    import sympy
    from math_verify import parse as math_verify_parse

    text = DEGREES.sub(RADIANS, text)
    if r"\circ" in text:
        return None  # a degree sign on anything but a number would be eaten
    try:
        parsed = math_verify_parse(
            rf"\boxed{{{brace_arguments(text)}}}",
            extraction_config(),
            fallback_mode="no_fallback",
            extraction_mode="first_match",
            parsing_timeout=None,  # the worker has a deadline of its own
            raise_on_error=True,
        )
    except (RecursionError, MemoryError):
        raise
    except Exception:  # whatever the grammar or sympy's constructors raise: the text has no meaning to them
        return None
    if not parsed or isinstance(parsed[0], str):
        return None
    if not is_scalar(parsed[0]):
        return parsed[0]
    imaginary = {letter: sympy.I for letter in parsed[0].free_symbols if str(letter) == "i"}
    return parsed[0].subs(imaginary).replace(lambda part: part.is_Float, lambda number: sympy.Rational(str(number)))


def equal(gold: str, answer: str, min_rounded_digits: int, tolerance: float = 0.0) -> bool:
    """Whether two normalised expressions are equal.

    Raises:
        UnparseableError: where math-verify cannot read one of them.
    """
    g, a = parse(gold), parse(answer)
    for parsed, text in ((g, gold), (a, answer)):
        if parsed is None:
            raise UnparseableError(text, is_gold=parsed is g and g is None)
    if any(undefined(side) for side in (g, a)):
        return False
    if is_scalar(g) and is_scalar(a):
        verdict = same_values(g, a, answer, min_rounded_digits, tolerance)
        if verdict is not None:
            return verdict
    return verify(g, a)


def is_scalar(side: Any) -> bool:
    """An expression of numbers and letters; no matrix, set, relation or tuple."""
    import sympy

    return isinstance(side, sympy.Expr) and not getattr(side, "is_Matrix", False)


def undefined(side: Any) -> bool:
    """Whether nan or an unsigned infinity is in it."""
    import sympy

    return bool(getattr(side, "has", None)) and side.has(sympy.nan, sympy.zoo)


def verify(gold: Any, answer: Any) -> bool:
    """math-verify's own verdict; gold first, for it is not symmetric."""
    from math_verify import verify as math_verify_verify
    from sympy.core.relational import Relational

    if isinstance(answer, Relational) or isinstance(gold, Relational):
        # math-verify takes the last side of any equation, and calls two equations equal that it cannot solve
        return isinstance(answer, Relational) and isinstance(gold, Relational) and same_relation(gold, answer)
    try:
        return math_verify_verify(
            [gold],
            [answer],
            float_rounding=6,
            numeric_precision=15,
            strict=True,
            allow_set_relation_comp=True,
            timeout_seconds=None,
            raise_on_error=True,
        )
    except (RecursionError, MemoryError):
        raise
    except Exception:  # sympy cannot compare the two kinds of thing
        return False


def same_relation(gold: Any, answer: Any) -> bool:
    """Whether two relations have equal sides, or, set against 0, differ by a constant factor at every point.

    The factor has to be positive for inequalities.
    """
    import mpmath
    import sympy

    if type(gold) is not type(answer) and type(gold) is not type(answer.reversed):
        return False
    answer = answer if type(gold) is type(answer) else answer.reversed
    if all(same_values(g, a, "", 1, 0.0) for g, a in zip(gold.args, answer.args, strict=True)):
        return True
    if not gold.free_symbols:
        return False
    left, right = gold.lhs - gold.rhs, answer.lhs - answer.rhs
    letters, ratios = sorted(left.free_symbols | right.free_symbols, key=str), []
    for point, _ in points(letters, has_steps(left) or has_steps(right)):
        g, a = number(left.subs(point)), number(right.subs(point))
        if g is not None and a is not None:
            if abs(a) < SAME or abs(g) < SAME:
                return False
            with mpmath.workdps(DIGITS):
                ratios.append(g / a)
    steady = len(ratios) >= 4 and all(near(ratio, ratios[0], SAME) for ratio in ratios)
    return steady and (isinstance(gold, sympy.Eq | sympy.Ne) or (abs(ratios[0].imag) < SAME and ratios[0].real > 0))


def same_values(gold: Any, answer: Any, answer_text: str, min_digits: int, tolerance: float) -> bool | None:
    """By value: of numbers once, of expressions at points for their letters.  None where there is no value to compare.

    At points where either side is not real the other is not asked: `2 \\ln x` and `\\ln x^2` agree where both are.
    """
    letters = sorted(gold.free_symbols | answer.free_symbols, key=str)
    if not letters:
        pair = (number(gold), number(answer))
        if None in pair:
            return None
        return same_number(*pair, answer_text, gold, min_digits, tolerance) and same_to_units(gold, answer, pair[0])
    agreements = 0
    for point, any_sign in points(letters, has_steps(gold) or has_steps(answer)):
        g, a = number(gold.subs(point)), number(answer.subs(point))
        if g is None or a is None:
            continue
        if any_sign and (abs(g.imag) > SAME or abs(a.imag) > SAME):
            continue
        if not near(g, a, SAME):
            return False
        agreements += 1
    return True if agreements >= 4 else None


def has_steps(side: Any) -> bool:
    import sympy

    return bool(side.has(sympy.floor, sympy.ceiling, sympy.Mod, sympy.sign, sympy.Heaviside))


def points(letters: list[Any], steps: bool) -> Iterator[tuple[dict[Any, Any], bool]]:
    """Values for the letters, and whether some are negative."""
    for shift in range(len(POINTS)):
        yield {letter: coordinate(shift, index) for index, letter in enumerate(letters)}, shift >= 4
    for whole in range(1, STEPS * steps + 1):
        yield {letter: whole + 7 * index for index, letter in enumerate(letters)}, False


def same_to_units(gold: Any, answer: Any, value: Any) -> bool:
    """Whether two numbers beyond 10^30 that agree in 40 digits agree in all before the point as well.

    `\\sqrt{10^{100000} + 1}` is not 10^50000; beyond 4,000 digits agreement is not looked for and not granted.
    """
    import mpmath

    if abs(value) < 1e30:
        return True
    size = int(mpmath.log10(abs(value)))
    if size > 4_000:
        return bool((gold - answer) == 0)
    difference, scale = number(gold - answer, size + DIGITS), number(gold, DIGITS)
    return difference is not None and abs(difference) <= abs(scale) * mpmath.mpf(10) ** (-size - 10)


def coordinate(shift: int, index: int) -> Any:
    """The value of a letter: positive in the first four points, of both signs in the others."""
    import sympy

    above, below = POINTS[(shift + 3 * index) % len(POINTS)]
    value = sympy.Rational(above + 2 * index, below)
    return -value if shift >= 4 and (shift + index) % 2 else value


def number(expression: Any, digits: int = DIGITS) -> Any:
    """A complex number to so many digits (mpmath), or None where the expression has no finite value."""
    import mpmath
    import sympy

    try:
        value = sympy.N(expression, digits)
    except (OverflowError, ValueError, ZeroDivisionError):  # beyond what mpmath can hold
        return None
    if not value.is_number or value.has(sympy.nan, sympy.zoo, sympy.oo):
        return None
    real, imaginary = value.as_real_imag()
    if not (real.is_Float or real.is_Rational) or not (imaginary.is_Float or imaginary.is_Rational):
        return None
    with mpmath.workdps(DIGITS):
        return mpmath.mpc(real._to_mpmath(170), imaginary._to_mpmath(170))


def near(left: Any, right: Any, tolerance: float) -> bool:
    """Relative difference within the tolerance; what is below 1e-45 on both sides is the noise of a zero."""
    import mpmath

    with mpmath.workdps(DIGITS):
        scale = max(abs(left), abs(right))
        return bool(scale < 1e-45 or abs(left - right) <= tolerance * scale)


def same_number(g: Any, a: Any, answer_text: str, gold: Any, min_digits: int, tolerance: float) -> bool:
    if near(g, a, max(SAME, tolerance)):
        return True
    decimal = DECIMAL.fullmatch(answer_text.strip())
    if decimal is None or gold.is_Rational:
        return False
    digits = decimal.group(2)
    if len(digits.replace(".", "").lstrip("0")) < min_digits:
        return False
    exponent = int(decimal.group(3) or decimal.group(4) or 0) - len(digits.partition(".")[2])
    return abs(g - a) <= 0.5 * 10.0**exponent
