r"""Units after a number: `5\text{ cm}`, `\$18.90`, `30^\circ`, `25\%`, `12 square inches`, `15\text{ students}`."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from fractions import Fraction

from rewards.texts import FUNCTIONS

# name -> (dimension, factor); plurals and full stops are taken off before the look-up.
UNITS: dict[str, tuple[str, Fraction]] = {
    name: (dimension, Fraction(factor))
    for dimension, table in {
        "metre": {
            "m meter metre": 1, "cm centimeter centimetre": "1/100", "mm millimeter millimetre": "1/1000",
            "km kilometer kilometre": 1000, "in inch": "0.0254", "ft foot feet": "0.3048", "yd yard": "0.9144",
            "mi mile": "1609.344", "dm decimeter": "1/10", "nm nanometer": "1e-9",
        },
        "second": {
            "s sec second": 1, "min minute": 60, "h hr hour": 3600, "day": 86400, "week": 604800,
            "ms millisecond": "1/1000",
        },
        "gram": {
            "g gram": 1, "kg kilogram": 1000, "mg milligram": "1/1000", "lb pound": "453.59237",
            "oz ounce": "28.349523125",
        },
        "litre": {
            "l liter litre": 1, "ml milliliter millilitre": "1/1000", "gallon gal": "3.785411784",
            "quart": "0.946352946",
        },
        "dollar": {"dollar usd $ buck": 1, "cent": "1/100"},
        "degree": {"degree deg": 1},
        "year": {"year yr": 12, "month": 1},
        "speed": {"mph": 1, "kph kmh": "0.621371192", "knot": "1.150779448"},
    }.items()
    for names, factor in table.items()
    for name in names.split()
}  # fmt: skip
WORD_FORMS = {"feet": "foot", "inches": "inch", "pounds": "pound"}
SCALES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
POWER_WORDS = {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cu": 3, "cubed": 3}
NOT_UNITS = frozenset(  # functions, and words that make a sentence of what would be a quantity
    [
        *FUNCTIONS,
        *(
            "det",
            "or",
            "and",
            "if",
            "for",
            "but",
            "with",
            "where",
            "when",
            "is",
            "are",
            "was",
            "be",
            "not",
        ),
        *(
            "no",
            "non",
            "isn",
            "wrong",
            "incorrect",
            "false",
            "right",
            "correct",
            "true",
            "maybe",
            "perhaps",
            "possibly",
        ),
        *("either", "neither", "than", "answer", "solution", "except", "unless", "instead", "then", "plus", "minus"),
    ]
)

CURRENCY = re.compile(r"^([+-]?)\s*(?:\\\$|£|€|¥|US\\\$|USD|Rs\.?)\s*(?=[\d.\\+-])")
DEGREES = re.compile(r"\s*\^\{\\circ\}\s*(?:\\text\{\s*[CF]\s*\}|[CF]\b)?$")
PERCENT = re.compile(r"\s*\\%$")
TEXT_TAIL = re.compile(
    r"(?<=[\d}!)\]A-Za-z])(?P<tail>(?:\s*(?:[*/]\s*)?\^?\{?\s*\\text\s*\{[^{}]*\}\s*\}?(?:\s*\^\s*(?:\{\s*-?\d\s*\}|-?\d))?)+"
    r"(?:\s*[A-Za-z]{2,}(?:\s+[A-Za-z]{2,}){0,3}\s*)?)$"
)
FRACTION_UNIT = re.compile(r"(?<=[\d}])(?P<tail>\s*\\frac\{\\text\{[^{}]*\}\}\{\\text\{[^{}]*\}(?:\^\{?\d\}?)?\})$")
WORD_TAIL = re.compile(
    r"(?<=[\d})\]])(?P<tail>\s*(?:[A-Za-z]{2,}\.?(?:[ /-]+|$)){0,4}(?:[A-Za-z]{2,}\.?|[A-Za-z]{2,}/[a-z]{1,3})"
    r"(?:\s*\^\s*(?:\{\s*\d\s*\}|\d))?)$"
)
FUNCTION = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")  # its argument keeps its degrees
POWER = re.compile(r"\^\s*\{?\s*(-?\d)\s*\}?")


@dataclass(frozen=True)
class Quantity:
    """The text of a number and the unit that followed it: "" for none, "%" for a percentage."""

    number: str
    unit: str = ""


@functools.lru_cache(maxsize=8_192)
def split_unit(text: str) -> Quantity:
    """Take a unit off a normalised expression; what is no number before it keeps everything."""
    text = text.strip()
    money = CURRENCY.match(text)
    if money:
        return Quantity((money.group(1) + CURRENCY.sub("", text)).strip(), "dollar")
    if text.endswith(r"\$") or text.endswith("€"):
        return Quantity(text.removesuffix(r"\$").removesuffix("€").strip(), "dollar")
    for pattern, unit in ((PERCENT, "%"), (DEGREES, "degree")):
        number = pattern.sub("", text)
        if number != text and number.strip() and not FUNCTION.search(number):
            return Quantity(number.strip(), unit)
    for pattern in (FRACTION_UNIT, TEXT_TAIL, WORD_TAIL):
        match = pattern.search(text)
        if match and looks_numeric(text[: match.start("tail")]):
            unit = unit_name(match.group("tail"))
            if unit is not None:
                return scaled(text[: match.start("tail")].strip(), unit)
    return Quantity(text)


def scaled(number: str, unit: str) -> Quantity:
    """`5 million people` as 5000000 people: a word for a number is no unit."""
    first, _, rest = unit.partition(" ")
    return scaled(f"({number})*{SCALES[first]}", rest) if first in SCALES else Quantity(number, unit)


def looks_numeric(text: str) -> bool:
    """Whether a unit may follow: digits are there, and no word or function but those of a radical expression."""
    bare = re.sub(r"\\(?:frac|sqrt|pi|infty|binom|pm|overline)(?![A-Za-z])", "", text)
    return bool(re.search(r"\d|\\pi|\\infty", text)) and not re.search(r"\\[A-Za-z]+|[A-Za-z]{2,}|[=<>]", bare)


def unit_name(tail: str) -> str | None:
    """The unit in words, lower case, without markup; None where the words are a function or a connector."""
    powers = POWER.findall(tail)
    words = re.sub(r"\\text|\\frac|[{}^*\\]", " ", POWER.sub(" ", tail)).replace("/", " per ").lower()
    names = [singular(word) for word in re.findall(r"[a-z$°]+", words)]
    if not names or any(name in NOT_UNITS for name in names) or any(re.search(r"\d", part) for part in words.split()):
        return None
    if names[0] in ("th", "st", "nd", "rd"):
        return "" if len(names) == 1 else None
    power = max([int(p) for p in powers] + [POWER_WORDS[n] for n in names if n in POWER_WORDS] + [1])
    names = [name for name in names if name not in POWER_WORDS]
    return " ".join(names) + (f"^{power}" if power > 1 else "")


def singular(word: str) -> str:
    word = WORD_FORMS.get(word, word)
    return word if word in UNITS or len(word) < 3 else word.removesuffix("s")


def conversion(gold: str, answer: str) -> Fraction | None:
    """What a number in the unit `answer` is multiplied with to be in the unit `gold`; None where they are at odds.

    A missing unit fits every unit, and so does one that is not in the table: nouns ("students") are not measures.
    """
    if not gold or not answer or gold == answer:
        return Fraction(1)
    (gold_name, _, gold_power), (answer_name, _, answer_power) = gold.partition("^"), answer.partition("^")
    known_gold, known_answer = UNITS.get(gold_name), UNITS.get(answer_name)
    if known_gold is None or known_answer is None:
        return Fraction(1)
    if known_gold[0] != known_answer[0] or gold_power != answer_power:
        return None
    return (known_answer[1] / known_gold[1]) ** int(gold_power or 1)
