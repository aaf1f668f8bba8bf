r"""Answers in words: `\text{Evelyn}`, `no solution`, `(C)`, and the constants that have a name."""

from __future__ import annotations

import re

FUNCTIONS = frozenset(
    [
        "sin",
        "cos",
        "tan",
        "cot",
        "sec",
        "csc",
        "log",
        "ln",
        "exp",
        "arcsin",
        "arccos",
        "arctan",
        "gcd",
        "lcm",
        "mod",
        "max",
        "min",
        "sinh",
        "cosh",
        "tanh",
    ]
)
TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
WORDS = re.compile(r"[A-Za-z][A-Za-z0-9' .,()&/-]*")
CHOICE = re.compile(r"\(?([A-Za-z])\)")
CONSTANTS = {
    r"\emptyset": r"\emptyset",
    r"\{\}": r"\emptyset",
    r"\mathbb{R}": r"\mathbb{R}",
    "emptyset": r"\emptyset",
    "allrealnumber": r"\mathbb{R}",
    "allreal": r"\mathbb{R}",
    "realnumber": r"\mathbb{R}",
    "infinity": r"\infty",
}
# Words for one answer, by the first of them.
SAME_WORDS = (
    ("no solution", "no solution exists", "there are no solutions", "there is no solution"),
    ("does not exist", "DNE"),
    ("undefined", "not defined"),
    ("infinitely many", "infinitely many solutions"),
)


def as_text(text: str) -> str | None:
    """The words of an answer in one form (lower case, no punctuation or plural s), or None where it is no text.

    Text is what stands in `\\text{...}` alone, a choice in brackets, or words of four letters and more.
    """
    inner = "".join(part if i % 2 else re.sub(r"[\\ ~]", " ", part) for i, part in enumerate(TEXT.split(text)))
    outside = re.sub(r"[\s().,:;'\"\\-]", "", TEXT.sub("", text))
    in_text = bool(TEXT.search(text)) and not outside
    choice = CHOICE.fullmatch(text.strip())
    if choice:
        return choice.group(1).lower()
    if not in_text:
        if len(text.strip()) == 1 and text.strip().isalpha():
            return text.strip().lower()
        if not WORDS.fullmatch(text) or not re.search(r"[A-Za-z]{3,}", text):
            return None
        if any(word.lower() in FUNCTIONS for word in re.findall(r"[A-Za-z]+", text)):
            return None
    words = canonical_words(inner)
    return words if re.search(r"[^\W\d_]", words) else None


def canonical_words(text: str) -> str:
    words = re.findall(r"[^\W_]+", text.casefold())
    singular = [word.removesuffix("s") if len(word) > 3 and not word.endswith("ss") else word for word in words]
    joined = "".join(singular)
    return CANONICAL_WORDS.get(joined, joined)


CANONICAL_WORDS: dict[str, str] = {}
CANONICAL_WORDS |= {canonical_words(other): canonical_words(same[0]) for same in SAME_WORDS for other in same[1:]}


def as_constant(text: str) -> str | None:
    """The canonical name of a set or number that is written as a word or a symbol."""
    stripped = text.strip()
    if stripped in CONSTANTS:
        return CONSTANTS[stripped]
    words = as_text(stripped)
    return CONSTANTS.get(words) if words else None
