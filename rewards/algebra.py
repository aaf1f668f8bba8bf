r"""Exact values of what answers mostly are: rationals, radicals, pi, i, and polynomials and their quotients.

A value is a quotient of two sums of terms; a term is a `Fraction` times powers of atoms.  Atoms are letters, pi, i, and
primes with a fractional exponent in [0, 1): `\sqrt{12}` is 2 * 3^(1/2).  Products of fractional powers of primes are
linearly independent over Q (Besicovitch 1940) and pi is transcendental, so two values are equal exactly where the
cross products have the same terms: no rounding, no search, and no sympy.

`UndecidedError` says that something lies outside; sympy decides that.  All work is bounded.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

MAX_BITS, MAX_TERMS, MAX_POWER = 20_000, 150, 64
Atom = str | int
Term = tuple[tuple[Atom, Fraction], ...]  # sorted powers of atoms
Sum = dict[Term, Fraction]
ONE: Sum = {(): Fraction(1)}


class UndecidedError(Exception):
    """What stands there is outside this algebra."""


class HugeError(UndecidedError):
    """A number on the way has more than `MAX_BITS` bits."""


class UndefinedError(Exception):
    """A division by zero: the expression has no value."""


@dataclass(frozen=True)
class Value:
    """`above / below`, two sums of terms."""

    above: Mapping[Term, Fraction]
    below: Mapping[Term, Fraction]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Value) and multiply(self.above, other.below) == multiply(other.above, self.below)

    __hash__ = None  # type: ignore[assignment]  # equal values may be spelled differently

    @property
    def rational(self) -> Fraction | None:
        """The value as a fraction, where it is one in this form."""
        if self.above.keys() <= {()} and self.below.keys() == {()}:
            return self.above.get((), Fraction(0)) / self.below[()]
        return None

    @property
    def letters(self) -> frozenset[str]:
        """The variables in it; pi and i are none."""
        atoms = {atom for part in (self.above, self.below) for term in part for atom, _ in term}
        return frozenset(a for a in atoms if isinstance(a, str) and a not in (r"\pi", "i"))


def check_size(number: Fraction) -> Fraction:
    if number.numerator.bit_length() + number.denominator.bit_length() > MAX_BITS:
        raise HugeError
    return number


def add(left: Mapping[Term, Fraction], right: Mapping[Term, Fraction], sign: int = 1) -> Sum:
    total = dict(left)
    for term, factor in right.items():
        total[term] = check_size(total.get(term, Fraction(0)) + sign * factor)
        if not total[term]:
            del total[term]
    if len(total) > MAX_TERMS:
        raise UndecidedError
    return total


def multiply(left: Mapping[Term, Fraction], right: Mapping[Term, Fraction]) -> Sum:
    if left == ONE:
        return dict(right)
    if right == ONE:
        return dict(left)
    if len(left) * len(right) > MAX_TERMS * 20:
        raise UndecidedError
    total: Sum = {}
    for a, x in left.items():
        for b, y in right.items():
            term, factor = join_terms(a, b)
            total[term] = check_size(total.get(term, Fraction(0)) + x * y * factor)
    return {term: factor for term, factor in total.items() if factor}


@functools.lru_cache(maxsize=16_384)
def join_terms(left: Term, right: Term) -> tuple[Term, Fraction]:
    powers: dict[Atom, Fraction] = dict(left)
    for atom, power in right:
        powers[atom] = powers.get(atom, Fraction(0)) + power
    return reduce_powers(powers)


def reduce_powers(powers: dict[Atom, Fraction]) -> tuple[Term, Fraction]:
    """The canonical term, and the rational factor that falls out of primes and of i."""
    factor, kept = Fraction(1), []
    for atom, power in powers.items():
        if isinstance(atom, int):
            whole = math.floor(power)
            factor, power = factor * Fraction(atom) ** whole, power - whole
        elif atom == "i":
            quarter = int(power) % 4
            factor, power = factor * (-1 if quarter >= 2 else 1), Fraction(quarter % 2)
        if power:
            kept.append((atom, power))
    return tuple(sorted(kept, key=lambda pair: (str(pair[0]), pair[1]))), factor


def constant(number: Fraction | int) -> Value:
    return Value({(): Fraction(number)} if number else {}, ONE)


def atom(name: Atom, power: Fraction | int = 1) -> Value:
    term, factor = reduce_powers({name: Fraction(power)})
    return Value({term: factor}, ONE)


def plus(a: Value, b: Value, sign: int = 1) -> Value:
    if a.below == b.below:
        return Value(add(a.above, b.above, sign), a.below)
    return Value(add(multiply(a.above, b.below), multiply(b.above, a.below), sign), multiply(a.below, b.below))


def times(a: Value, b: Value) -> Value:
    return tidy(multiply(a.above, b.above), multiply(a.below, b.below))


def divide(a: Value, b: Value) -> Value:
    if not b.above:
        raise UndefinedError
    return tidy(multiply(a.above, b.below), multiply(a.below, b.above))


def tidy(above: Sum, below: Sum) -> Value:
    """A single term below goes above."""
    if len(below) != 1 or below == ONE:
        return Value(above, below)
    [(term, factor)] = below.items()
    inverse, extra = reduce_powers({name: -power for name, power in term})
    return Value(multiply(above, {inverse: extra / factor}), ONE)


def raise_to(base: Value, exponent: Value) -> Value:
    power = exponent.rational
    if power is None:
        return power_with_letters(base, exponent)
    if power.denominator != 1:
        return root(base, power)
    n = int(power)
    if n < 0:
        return raise_to(divide(constant(1), base), constant(-n))
    if len(base.above) <= 1 and base.below == ONE:
        return power_of_term(base, n)
    if n > MAX_POWER or (n > 8 and len(base.above) > 6):
        raise UndecidedError
    result = constant(1)
    for _ in range(n):
        result = times(result, base)
    return result


def power_with_letters(base: Value, exponent: Value) -> Value:
    """`4^{n+1}` as 2^2 (2^n)^2, with `2^n` an atom: powers of distinct primes, of e and of letters are independent."""
    if exponent.below != ONE or base.below != ONE or len(base.above) != 1 or len(exponent.above) > 6:
        raise UndecidedError
    [(term, factor)] = base.above.items()
    bases: dict[Atom, Fraction] = dict(term)
    if factor <= 0 or any(isinstance(name, str) and ("^" in name or name == "i" or p != 1) for name, p in term):
        raise UndecidedError
    for number, sign in ((factor.numerator, 1), (factor.denominator, -1)):
        for prime, count in factorise(number).items():
            bases[prime] = bases.get(prime, Fraction(0)) + sign * count
    powers: dict[Atom, Fraction] = {}
    for monomial, coefficient in exponent.above.items():
        if any(isinstance(name, int) or name == "i" for name, _ in monomial):
            raise UndecidedError
        for name, power in bases.items():
            key = f"{name}^{monomial_name(monomial)}" if monomial else name
            powers[key] = powers.get(key, Fraction(0)) + power * coefficient
    reduced, extra = reduce_powers(powers)
    return Value({reduced: check_size(extra)}, ONE)


def monomial_name(monomial: Term) -> str:
    return "*".join(f"{name}^{power}" for name, power in monomial)


def power_of_term(base: Value, n: int) -> Value:
    if not base.above:
        if n == 0:
            raise UndefinedError
        return base
    [(term, factor)] = base.above.items()
    bits = max(abs(factor.numerator).bit_length(), factor.denominator.bit_length())
    if bits > 1 and bits * n > 2 * MAX_BITS:
        raise HugeError
    if n > 10**6 and term:
        raise UndecidedError
    raised, extra = reduce_powers({name: power * n for name, power in term})
    return Value({raised: check_size(factor**n * extra)}, ONE)


def root(base: Value, power: Fraction) -> Value:
    """`base ** power` with a fractional power, of a single term; letters keep to the powers where no sign is lost."""
    if not base.above:
        return base if power > 0 else divide(constant(1), base)
    if len(base.above) != 1 or base.below != ONE or power.denominator > 12 or abs(power) > 64:
        raise UndecidedError
    [(term, factor)] = base.above.items()
    if any(p % 2 == 0 or p.denominator > 1 or name == "i" for name, p in term if isinstance(name, str)):
        raise UndecidedError  # sqrt(x^2) is |x|, not x
    powers: dict[Atom, Fraction] = {name: p * power for name, p in term}
    if factor < 0:
        if power != Fraction(1, 2):
            raise UndecidedError
        powers["i"] = Fraction(1)
    for number, sign in ((abs(factor.numerator), 1), (factor.denominator, -1)):
        for prime, count in factorise(number).items():
            powers[prime] = powers.get(prime, Fraction(0)) + sign * count * power
    reduced, extra = reduce_powers(powers)
    return Value({reduced: check_size(extra)}, ONE)


@functools.lru_cache(maxsize=4_096)
def factorise(number: int) -> dict[int, int]:
    """Prime factors by trial division; gives up where a factor above 10^4 might be composite."""
    factors: dict[int, int] = {}
    prime = 2
    while prime * prime <= number:
        if prime > 10_000:
            raise UndecidedError
        while number % prime == 0:
            factors[prime] = factors.get(prime, 0) + 1
            number //= prime
        prime += 1 if prime == 2 else 2
    if number > 1:
        factors[number] = factors.get(number, 0) + 1
    return factors


def factorial(value: Value) -> Value:
    number = value.rational
    if number is None or number.denominator != 1 or number < 0:
        raise UndecidedError
    if number > 2_500:
        raise HugeError
    return constant(check_size(Fraction(math.factorial(int(number)))))


def factorial_quotient(above: int, below: int) -> Value:
    """`above! / below!` without either factorial."""
    if abs(above - below) > 500:
        raise HugeError
    product = math.prod(range(min(above, below) + 1, max(above, below) + 1))
    return constant(Fraction(product) if above >= below else Fraction(1, product))


def binomial(n: Value, k: Value) -> Value:
    top, bottom = n.rational, k.rational
    if bottom is None or bottom.denominator != 1 or bottom < 0 or bottom > 2_000:
        raise UndecidedError
    if top is not None and top.denominator == 1 and top >= 0:
        if top > 20_000:
            raise HugeError
        return constant(check_size(Fraction(math.comb(int(top), int(bottom)))))
    if bottom > 6:
        raise UndecidedError
    result = constant(1)
    for step in range(int(bottom)):
        result = divide(times(result, plus(n, constant(step), -1)), constant(step + 1))
    return result
