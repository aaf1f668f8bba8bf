r"""Reads a normalised LaTeX expression as an exact `Value`; gives up on every function and on every doubtful notation.

Doubtful is what readers take in two ways: `1/2x`, `5\frac{7}{2}`, two numbers side by side.
"""

from __future__ import annotations

import functools
import re
from fractions import Fraction

from rewards import algebra
from rewards.algebra import HugeError, UndecidedError, UndefinedError, Value

MAX_DEPTH, MAX_TOKENS = 24, 1_500
TOKEN = re.compile(
    r"""\s*(?:
      (?P<repeating>\d*\.\d*\\overline\s*\{\d+\}|\d*\.\d*\\dot\s*\{?\d\}?|(?=\d*\.\d+\s*(?:\\ldots|\.\.\.))\d*\.\d*
        (?P<unit>\d{1,3}?)(?P=unit){2,}\s*(?:\\ldots|\.\.\.))
    | (?P<scientific>(?:\d+\.?\d*|\.\d+)[eE][+-]?\d{1,6}(?![\w.]))
    | (?P<number>\d{1,3}(?:,\d{3})+(?:\.\d+)?(?![\d,])|\d+\.?\d*|\.\d+)
    | (?P<pi>\\pi(?![A-Za-z]))
    | (?P<command>\\(?:frac|sqrt|binom)(?![A-Za-z]))
    | (?P<letter>(?:[A-Za-z]|\\(?:alpha|beta|gamma|delta|theta|lambda|mu|phi|varphi|omega|sigma|rho|tau
        |epsilon|varepsilon|zeta|eta|kappa|nu|xi|psi|chi|ell|hbar|Delta|Gamma|Omega|Phi|Psi|Sigma|Lambda|Theta)
        (?![A-Za-z]))(?:\s*_\s*(?:[A-Za-z0-9]|\{[A-Za-z0-9]{1,6}\}))?)
    | (?P<symbol>[-+*/^!(){}\[\]|])
    )""",
    re.VERBOSE,
)
CLOSING = {"(": ")", "{": "}", "[": "]", "|": "|"}
FACTORIAL_QUOTIENT = re.compile(r"\\frac\s*\{\(?(\d{1,7})\)?!\}\s*\{\(?(\d{1,7})\)?!\}")
WORD = re.compile(r"(?<![\\A-Za-z{])[A-Za-z]{4,}")  # four letters in a row are a word, not a product


class Undefined:
    """The value of a division by zero: equal to nothing."""


class Huge:
    """The value of what passes through a number beyond `algebra.MAX_BITS`."""


UNDEFINED, HUGE = Undefined(), Huge()
Reading = Value | Undefined | Huge | None


@functools.lru_cache(maxsize=8_192)
def evaluate(text: str) -> Reading:
    """The exact value of an expression, `UNDEFINED`, `HUGE`, or None where this algebra cannot tell."""
    quotient = FACTORIAL_QUOTIENT.fullmatch(text.strip())
    try:
        if quotient:
            return algebra.factorial_quotient(int(quotient.group(1)), int(quotient.group(2)))
        if not text.strip() or WORD.search(text):
            return None
        return Parser(tokenise(text)).whole()
    except HugeError:
        return HUGE
    except UndefinedError:
        return UNDEFINED
    except UndecidedError:
        return None


def tokenise(text: str) -> list[tuple[str, str]]:
    tokens, position = [], 0
    while position < len(text):
        match = TOKEN.match(text, position)
        if match is None:
            if text[position:].strip():
                raise UndecidedError
            break
        kind = match.lastgroup if match.lastgroup != "unit" else "repeating"
        tokens.append((kind or "", match.group(kind or 0).strip()))
        position = match.end()
        if len(tokens) > MAX_TOKENS:
            raise UndecidedError
    return tokens


class Parser:
    """Recursive descent over tokens; what is left to read is `tokens[position:]`."""

    def __init__(self, tokens: list[tuple[str, str]]) -> None:
        self.tokens = tokens
        self.position = 0
        self.depth = 0

    def peek(self) -> tuple[str, str]:
        return self.tokens[self.position] if self.position < len(self.tokens) else ("end", "")

    def take(self) -> tuple[str, str]:
        token = self.peek()
        self.position += 1
        return token

    def whole(self) -> Value:
        value = self.sum()
        if self.peek()[0] != "end":
            raise UndecidedError
        return value

    def sum(self) -> Value:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise UndecidedError
        value = self.product()
        while self.peek()[1] in ("+", "-"):
            sign = 1 if self.take()[1] == "+" else -1
            value = algebra.plus(value, self.product(), sign)
        self.depth -= 1
        return value

    def product(self) -> Value:
        sign = 1
        while self.peek()[1] in ("+", "-"):
            sign *= -1 if self.take()[1] == "-" else 1
        value = self.power()
        slashed = False
        while True:
            kind, text = self.peek()
            if text in ("*", "/"):
                self.take()
                factor = self.signed_power()
                value = algebra.times(value, factor) if text == "*" else algebra.divide(value, factor)
                slashed = text == "/"
            elif kind in ("letter", "pi", "command") or text in ("(", "[", "{"):
                if slashed:
                    raise UndecidedError  # 1/2x
                value = algebra.times(value, self.power())
            elif kind in ("number", "repeating", "scientific"):
                raise UndecidedError  # two numbers side by side
            else:
                return algebra.times(algebra.constant(sign), value) if sign < 0 else value

    def signed_power(self) -> Value:
        if self.peek()[1] == "-":
            self.take()
            return algebra.times(algebra.constant(-1), self.power())
        return self.power()

    def power(self) -> Value:
        base = self.postfix()
        if self.peek()[1] == "^":
            self.take()
            base = algebra.raise_to(base, self.exponent())
            if self.peek()[1] in ("^", "!"):
                raise UndecidedError
        return base

    def exponent(self) -> Value:
        if self.peek()[1] in ("{", "("):
            return self.group()
        sign = 1
        if self.peek()[1] == "-":
            self.take()
            sign = -1
        value = self.primary()
        if self.peek()[1] == "^":  # 9^9^9 groups to the right
            self.take()
            value = algebra.raise_to(value, self.exponent())
        return algebra.times(algebra.constant(sign), value)

    def postfix(self) -> Value:
        value = self.primary()
        while self.peek()[1] == "!":
            self.take()
            value = algebra.factorial(value)
        return value

    def group(self) -> Value:
        opening = self.take()[1]
        value = self.sum()
        if self.take()[1] != CLOSING[opening]:
            raise UndecidedError
        return value

    def primary(self) -> Value:
        kind, text = self.peek()
        if kind == "command":
            return self.command()
        if text in ("(", "{", "["):
            return self.group()
        if text == "|":
            return self.absolute()
        read = {"number": self.number, "repeating": self.repeating, "scientific": self.scientific}.get(kind)
        self.take()
        if read is not None:
            return read(text)
        if kind == "letter":
            return algebra.atom(re.sub(r"[\s{}]", "", text))
        if kind == "pi":
            return algebra.atom(r"\pi")
        raise UndecidedError

    def absolute(self) -> Value:
        value = self.group()
        number = value.rational
        if number is None:
            raise UndecidedError
        return algebra.constant(abs(number))

    def command(self) -> Value:
        name = self.take()[1]
        if name == r"\sqrt":
            degree = self.group().rational if self.peek()[1] == "[" else Fraction(2)
            return self.root(self.argument(whole_number=True), degree)
        first, second = self.argument(), self.argument()
        return algebra.divide(first, second) if name == r"\frac" else algebra.binomial(first, second)

    def root(self, radicand: Value, degree: Fraction | None) -> Value:
        if degree is None or degree.denominator != 1 or not 2 <= degree <= 12:
            raise UndecidedError
        number = radicand.rational
        if number is not None and number < 0 and degree % 2:
            return algebra.times(algebra.constant(-1), algebra.root(algebra.constant(-number), 1 / degree))
        return algebra.root(radicand, 1 / degree)

    def argument(self, whole_number: bool = False) -> Value:
        r"""The argument of a command: a group, or one token; of a number one digit (`\frac12`), of a root all."""
        kind, text = self.peek()
        if text == "{":
            return self.group()
        if kind == "number" and not whole_number and len(text) > 1:
            if not text.isdigit():
                raise UndecidedError
            self.tokens[self.position : self.position + 1] = [("number", text[0]), ("digits", text[1:])]
            return self.primary()
        if kind == "digits":
            if len(text) != 1:
                raise UndecidedError  # \frac123
            self.take()
            return algebra.constant(int(text))
        if kind in ("number", "letter", "pi", "command"):
            return self.primary()
        raise UndecidedError

    def number(self, text: str) -> Value:
        value = algebra.constant(read_decimal(text))
        kind, following = self.peek()
        if following == r"\frac" or (kind == "number" and text.isdigit()):
            return self.mixed(value, following)
        return value

    def mixed(self, whole: Value, following: str) -> Value:
        r"""`1\frac{4}{5}` and `1 4/5`: a whole number and a proper fraction of numbers."""
        tokens = self.tokens[self.position :]
        if following != r"\frac":
            kinds, texts = [kind for kind, _ in tokens[:3]], [text for _, text in tokens[:3]]
            if kinds == ["number", "symbol", "number"] and texts[1] == "/" and (texts[0] + texts[2]).isdigit():
                self.position += 3
                return self.add_fraction(whole, texts[0], texts[2])
            raise UndecidedError
        texts = [text for _, text in tokens[1:7]]
        if texts[0:1] == ["{"] and texts[2:4] == ["}", "{"] and texts[5:6] == ["}"] and texts[1].isdigit():
            if texts[4].isdigit():
                self.position += 7
                return self.add_fraction(whole, texts[1], texts[4])
        elif texts and len(texts[0]) == 2 and texts[0].isdigit():  # 3\frac12
            self.position += 2
            return self.add_fraction(whole, texts[0][0], texts[0][1])
        return whole

    def add_fraction(self, whole: Value, above: str, below: str) -> Value:
        if not 0 < int(above) < int(below) or self.peek()[1] == "^":
            raise UndecidedError
        return algebra.plus(whole, algebra.constant(Fraction(int(above), int(below))))

    def scientific(self, text: str) -> Value:
        mantissa, _, exponent = text.lower().partition("e")
        if abs(int(exponent)) > algebra.MAX_BITS // 4:
            raise HugeError
        return algebra.constant(read_decimal(mantissa) * Fraction(10) ** int(exponent))

    def repeating(self, text: str) -> Value:
        digits = re.match(
            r"(\d*)\.(\d*?)(?:\\(?:overline|dot)\s*\{?(\d+)\}?|(\d{1,3}?)\4{2,}\s*(?:\\ldots|\.\.\.))$", text
        )
        if digits is None:
            raise UndecidedError
        whole, start, period = digits.group(1) or "0", digits.group(2), digits.group(3) or digits.group(4)
        number = Fraction(int(whole + start)) + Fraction(int(period), 10 ** len(period) - 1)
        return algebra.constant(number / 10 ** len(start))


def read_decimal(text: str) -> Fraction:
    text = text.replace(",", "")
    if len(text) > 4_000:
        raise HugeError
    whole, _, decimals = text.partition(".")
    return Fraction(int((whole + decimals) or 0), 10 ** len(decimals))
