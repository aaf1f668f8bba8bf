"""Whether an answer equals the gold: math-verify, with both sides put into a box before they are parsed.

A bare gold is misread (`3\\sqrt{13}` parses as 3, `1,3` as 1.3); inside a box it is not.
"""

from __future__ import annotations

import functools
import threading
from typing import Any

TIMEOUT_SECONDS = 5  # math-verify's own limit for one parse and for one comparison


def timeout_seconds() -> int | None:
    """math-verify's limit rests on SIGALRM, which exists in the main thread only; elsewhere there is none."""
    return TIMEOUT_SECONDS if threading.current_thread() is threading.main_thread() else None


@functools.cache
def extraction_config() -> tuple[Any, ...]:
    """Read boxes only; keep units and equations as they are, so that nothing is eaten in silence."""
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


@functools.lru_cache(maxsize=20_000)
def parse_answer(answer: str) -> tuple[Any, ...]:
    """The parsed content of a box, empty where it cannot be read."""
    from math_verify import parse

    return tuple(
        parse(
            f"\\boxed{{{answer}}}",
            extraction_config(),
            fallback_mode="no_fallback",
            extraction_mode="first_match",
            parsing_timeout=timeout_seconds(),
        )
    )


def strip_answer(answer: str) -> str:
    """Without surrounding space, dollar signs and a closing full stop."""
    return answer.strip().strip("$").strip().removesuffix(".").strip()


def is_readable(gold: str) -> bool:
    """Whether a gold can be compared with anything: not empty, and parsed by math-verify."""
    gold = strip_answer(gold)
    return bool(gold) and bool(parse_answer(gold))


def equal(gold: str, answer: str) -> bool:
    """Whether `answer` equals `gold`; both are the contents of a box.  Not symmetric: the gold comes first."""
    from math_verify import verify

    gold, answer = strip_answer(gold), strip_answer(answer)
    if gold == answer:
        return bool(gold)
    parsed_gold, parsed_answer = parse_answer(gold), parse_answer(answer)
    if not parsed_gold or not parsed_answer:
        return False
    return verify(
        list(parsed_gold),
        list(parsed_answer),
        float_rounding=6,
        numeric_precision=15,
        strict=True,
        allow_set_relation_comp=True,
        timeout_seconds=timeout_seconds(),
    )
