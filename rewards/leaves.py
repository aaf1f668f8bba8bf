"""Whether two expressions have the same exact value: the rungs of the ladder that need no sympy.

Three answers: True, False, and None for "not here": a function, an exponent with a letter, a notation in doubt.
"""

from __future__ import annotations

import decimal
import re
from fractions import Fraction

from rewards import algebra
from rewards.algebra import Sum, UndecidedError, UndefinedError, Value
from rewards.expression import HUGE, UNDEFINED, evaluate
from rewards.shapes import Leaf
from rewards.strictness import Strictness
from rewards.units import conversion

PI = decimal.Decimal("3.14159265358979323846264338327950288419716939937510582097494459230781640628620899863")
PRECISION = decimal.Context(prec=60)
DECIMAL = re.compile(
    r"([+-]?)\s*(\d[\d,]*\.\d+|\.\d+|\d+\.\d*)\s*(?:\*\s*10\s*\^\s*\{?\s*(-?\d{1,4})\s*\}?|[eE]([+-]?\d{1,4}))?"
)
UNEVALUATED = re.compile(r"\\(?:sum|prod|int|iint|iiint|oint|lim)(?![A-Za-z])")
EATEN = re.compile(r"(?<![A-Za-z}\d])\d+\s*_|\\%")  # math-verify drops a base, and a percent sign that is left over
CAPITAL = re.compile(r"\\[A-Za-z]+|[A-Z]")


def same_leaf(gold: Leaf, answer: Leaf, strictness: Strictness, tolerance: float, identity: bool) -> bool | None:
    """Whether two leaves are equal, unit and percent sign included; None where sympy has to tell.

    Without `identity` the same string is no proof: a gold that is checked against itself has to be understood.
    """
    factor = Fraction(1)
    if "%" not in (gold.unit, answer.unit):
        converted = conversion(gold.unit, answer.unit)
        if converted is None:
            return False
        factor = converted
    if refused(gold.text, answer.text, strictness):
        return False
    if identity and squeeze(gold.text) == squeeze(answer.text) and gold.text and factor == 1:
        return evaluate(gold.text) is not UNDEFINED
    if EATEN.search(gold.text) or EATEN.search(answer.text):
        return False
    return same_value(gold, answer, factor, strictness, tolerance)


def same_value(gold: Leaf, answer: Leaf, factor: Fraction, strictness: Strictness, tolerance: float) -> bool | None:
    g, a = evaluate(gold.text), evaluate(answer.text)
    if not gold.text or not answer.text or UNDEFINED in (g, a):
        return False
    if r"\infty" in gold.text + answer.text:
        return same_infinity(gold.text, answer.text, g, a)
    if a is HUGE and isinstance(g, Value) and not strictness.huge_numbers:
        return False
    if not isinstance(g, Value) or not isinstance(a, Value):
        return None
    try:
        a = algebra.times(a, algebra.constant(factor)) if factor != 1 else a
        pairs = [(g, a)]
        hundredth = algebra.constant(Fraction(1, 100))
        if gold.unit == "%" != answer.unit:  # 25% is 25 and 0.25
            pairs.append((algebra.times(g, hundredth), a))
        elif answer.unit == "%" != gold.unit and not is_count(g):  # 0.25 is 25%; but 7 is 7%, as a number of percent
            pairs.append((g, algebra.times(a, hundredth)))
        if any(x == y or close(x, y, tolerance) for x, y in pairs) or fold_case(gold.text, answer.text):
            return True
        return rounded(gold.text, answer.text, g, a, strictness.min_rounded_digits)
    except UndecidedError:
        return None
    except UndefinedError:
        return False


def is_count(value: Value) -> bool:
    """Whether a gold is a whole number beyond one: nobody writes 7 as 700%."""
    number = value.rational
    return number is not None and number.denominator == 1 and abs(number) > 1


def refused(gold: str, answer: str, strictness: Strictness) -> bool:
    """Whether an answer is the question in other words: a sum, product, integral or limit left as it is."""
    if strictness.unevaluated or not UNEVALUATED.search(answer) or UNEVALUATED.search(gold):
        return False
    value = evaluate(gold)
    return (isinstance(value, Value) and not value.letters) or not re.search(
        r"(?<![\\A-Za-z])[A-Za-z](?![A-Za-z])", gold
    )


def squeeze(text: str) -> str:
    return re.sub(r"\s+", "", text)


def same_infinity(gold: str, answer: str, g: object, a: object) -> bool | None:
    """Infinity equals infinity of the same sign; an expression with it in it equals nothing finite."""
    names = [squeeze(text).removeprefix("+") for text in (gold, answer)]
    if names[0] in (r"\infty", r"-\infty") or isinstance(g, Value):
        return names[0] == names[1]
    return None


def fold_case(gold: str, answer: str) -> bool:
    """Whether the two are equal once letters are lower case, where the gold does not use a letter in both cases."""
    small, large = (
        set(re.findall(r"(?<![\\A-Za-z])[a-z]", gold)),
        {c.lower() for c in re.findall(r"(?<![\\A-Za-z])[A-Z]", gold)},
    )
    if small & large or not re.search("[A-Z]", gold + answer):
        return False
    lowered = [CAPITAL.sub(lambda m: m.group() if len(m.group()) > 1 else m.group().lower(), t) for t in (gold, answer)]
    g, a = map(evaluate, lowered)
    return isinstance(g, Value) and isinstance(a, Value) and bool(g.letters) and g == a


def approximate(value: Value) -> decimal.Decimal | None:
    """A real number to 60 digits, or None where letters or i are in it."""
    with decimal.localcontext(PRECISION):
        parts = []
        for terms in (value.above, value.below):
            total = decimal.Decimal(0)
            for term, factor in terms.items():
                part = decimal.Decimal(factor.numerator) / decimal.Decimal(factor.denominator)
                for atom, power in term:
                    if isinstance(atom, str) and atom != r"\pi":
                        return None
                    exponent = decimal.Decimal(power.numerator) / decimal.Decimal(power.denominator)
                    part *= (PI if atom == r"\pi" else decimal.Decimal(atom)) ** exponent
                total += part
            parts.append(total)
        return parts[0] / parts[1] if parts[1] else None


def close(gold: Value, answer: Value, tolerance: float) -> bool:
    """Within the relative tolerance of the dataset; 0 demands exactness."""
    if not tolerance:
        return False
    g, a = approximate(gold), approximate(answer)
    return g is not None and a is not None and abs(g - a) <= abs(g) * decimal.Decimal(tolerance)


def rounded(gold: str, answer: str, g: Value, a: Value, min_digits: int) -> bool:
    """Whether one side is a decimal that rounds the other, which has no end, rightly and to enough digits."""
    for text, exact in ((answer, g), (gold, a)):
        number = DECIMAL.fullmatch(text.strip())
        if number is None or terminates(exact):
            continue
        digits = number.group(2).replace(",", "")
        target = approximate(exact)
        if target is None or len(digits.replace(".", "").lstrip("0")) < min_digits:
            continue
        exponent = int(number.group(3) or number.group(4) or 0) - len(digits.partition(".")[2])
        written = decimal.Decimal((number.group(1) if number.group(1) == "-" else "") + digits.rstrip("."))
        written = written.scaleb(exponent + len(digits.partition(".")[2]), PRECISION)
        if abs(PRECISION.subtract(written, target)) <= decimal.Decimal(5).scaleb(exponent - 1, PRECISION):
            return True
    return False


def terminates(value: Value) -> bool:
    number = value.rational
    if number is None:
        return False
    below = number.denominator
    for prime in (2, 5):
        while below % prime == 0:
            below //= prime
    return below == 1


def proportional(left: str, right: str, positive: bool) -> bool | None:
    """Whether two expressions, each set against 0, state one equation (or, with `positive`, one inequality)."""
    u, v = evaluate(left), evaluate(right)
    if not isinstance(u, Value) or not isinstance(v, Value):
        return None
    try:
        above, other = clear_denominators(u.above), clear_denominators(v.above)
    except UndecidedError:
        return None
    if above.keys() != other.keys() or not above:
        return False
    ratios = {above[term] / other[term] for term in above}
    return len(ratios) == 1 and (not positive or min(ratios) > 0)


def clear_denominators(terms: Sum) -> Sum:
    """Times the smallest product of letters that leaves no letter below: `y - 1/x` as `x y - 1`."""
    lowest: dict = {}
    for term in terms:
        for atom, power in term:
            if isinstance(atom, str) and power < 0:
                lowest[atom] = max(lowest.get(atom, 0), -power)
    factor, extra = algebra.reduce_powers(lowest)
    return algebra.multiply(terms, {factor: extra})
