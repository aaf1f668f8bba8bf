"""Where the answer stands in a completion.  One extractor for rewards, golds and evaluation; no sympy here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped character is skipped whole, so that \{ opens nothing


def completion_text(completion: str | Sequence[Mapping[str, object]]) -> str:
    """The text of a completion: the string itself, or the content of the last assistant message of a chat.

    Raises:
        TypeError: for anything else, naming what was given.
    """
    if isinstance(completion, str):
        return completion
    if isinstance(completion, Sequence) and all(isinstance(message, Mapping) for message in completion):
        for message in reversed(completion):
            if message.get("role") == "assistant":
                return str(message.get("content") or "")
        return ""
    raise TypeError(f"a completion is a string or a list of chat messages, not {type(completion).__name__}")


def last_boxed(text: str) -> str | None:
    r"""The content of the last closed `\boxed{...}` or `\fbox{...}` with matched braces, or None.

    An unclosed box is no answer.  Linear in the length of the text: one pass over braces, boxes found beforehand.
    """
    opening = {match.end() - 1: match.end() for match in BOX.finditer(text)}  # position of "{" -> start of content
    if not opening:
        return None
    answer = None
    stack: list[int] = []
    for match in BRACE.finditer(text, pos=min(opening)):
        if match.group() == "{":
            stack.append(match.start())
        elif match.group() == "}" and stack:
            start = opening.get(stack.pop())
            if start is not None:
                answer = text[start : match.start()]
    return answer
