r"""Where the answer stands in a completion.  The one extractor, for rewards, golds and evaluation; no sympy here.

The text after the last closed thinking block counts; in it the last closed `\boxed{...}` or `\fbox{...}`.  Every step
is linear in the length of the text, so a megabyte of braces costs no more than a megabyte of prose.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

THINKING_TAG = re.compile(r"<(/?)(think|thinking|thought|reasoning)>")
BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
BARE_BOX = re.compile(r"\\boxed\s*(-?\d+(?:\.\d+)?|(?<=\s)[A-Za-z])(?![A-Za-z0-9])")  # `\boxed 5`, as some golds have
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped character is skipped whole, so that \{ opens nothing
BETWEEN_BOXES = re.compile(
    r"(?:\s|[$,;.*]|\\[()\[\] ,;]|\\q?quad\b|\b(?:and|or)\b|\\text\{\s*(?:and|or)\s*\}"
    r"|[A-Za-z](?:_\{?\w\}?)?\s*=){0,16}"
)
PHRASE = re.compile(r"\banswer\b[^\n.:=]{0,40}?(?:\bis\b|[:=])[ \t*:]*([^\n]{1,400})", re.IGNORECASE)
SENTENCE_END = re.compile(r"\.(?:\s|$)|\$\s*\.")
MAX_CHARS = 4_001  # one more than the longest answer that any mode reads: enough to see that it is too long


@dataclass(frozen=True)
class Extraction:
    """What was read from a completion."""

    answer: str | None  # content of the last closed box, or what followed the phrase
    source: str | None = None  # "box", or "phrase" where only "the answer is ..." was found
    joined: str | None = None  # the last run of adjacent boxes as one list, where there are several
    boxes: int = 0  # boxes with distinct contents
    truncated: bool = False  # no answer, and the text ends inside a thinking block or inside a box


def completion_text(completion: str | Sequence[Mapping[str, object]]) -> str:
    """The text of a completion: the string itself, or the content of the last assistant message of a chat.

    A content in blocks (`[{"type": "text", "text": ...}]`) is the concatenation of its texts.

    Raises:
        TypeError: for anything else, naming what was given.
    """
    if isinstance(completion, str):
        return completion
    if isinstance(completion, Sequence) and all(isinstance(message, Mapping) for message in completion):
        for message in reversed(completion):
            if message.get("role", "assistant") == "assistant":
                content = message.get("content") or ""
                if isinstance(content, str):
                    return content
                return "".join(str(block.get("text", "")) for block in content if isinstance(block, Mapping))
        return ""
    raise TypeError(f"a completion is a string or a list of chat messages, not {type(completion).__name__}")


def after_thinking(text: str, prefilled: bool = False) -> str | None:
    """The text after the last closed thinking block, or None where a block is still open.

    A closing tag alone closes a block whose opening tag stood in the prompt.  With `prefilled` the prompt is known to
    have opened a block, so without any closing tag the text is still inside it.
    """
    end, is_open = 0, prefilled
    for tag in THINKING_TAG.finditer(text):
        is_open = not tag.group(1)
        if not is_open:
            end = tag.end()
    return None if is_open else text[end:]


def find_boxes(text: str) -> tuple[list[tuple[int, int, int]], bool]:
    """The outermost closed boxes as (start of the command, start and end of the content), and whether one is left open.

    One pass over the braces: what a box encloses is dropped when it closes.
    """
    opening = {match.end() - 1: match.start() for match in BOX.finditer(text)}  # position of "{" -> command
    found = [(match.start(), match.start(1), match.end(1)) for match in BARE_BOX.finditer(text)]
    closed: list[tuple[int, int, int]] = []
    stack: list[int] = []
    if opening:
        for match in BRACE.finditer(text, pos=min(opening)):
            if match.group() == "{":
                stack.append(match.start())
            elif match.group() == "}" and stack:
                brace = stack.pop()
                if brace in opening:
                    while closed and closed[-1][0] > opening[brace]:
                        closed.pop()
                    closed.append((opening[brace], brace + 1, match.start()))
    left_open = any(brace in opening for brace in stack)
    if not found:
        return closed, left_open
    outside = [box for box in found if not any(start <= box[0] < end for _, start, end in closed[-50:])]
    return sorted([*closed, *outside]), left_open


def last_boxed(text: str) -> str | None:
    r"""The content of the last closed `\boxed{...}` or `\fbox{...}` with matched braces, or None."""
    boxes, _ = find_boxes(text)
    return text[boxes[-1][1] : boxes[-1][2]] if boxes else None


def extract(text: str, prefilled: bool = False, phrase_fallback: bool = False) -> Extraction:
    """The answer of a completion.

    Args:
        text: the completion.
        prefilled: whether the prompt ended with an opening thinking tag.
        phrase_fallback: whether "the answer is ..." counts where there is no box; `source` then tells.
    """
    visible = after_thinking(text, prefilled)
    if visible is None:
        return Extraction(None, truncated=True)
    boxes, left_open = find_boxes(visible)
    if not boxes:
        phrase = last_phrase(visible) if phrase_fallback else None
        return Extraction(phrase, "phrase" if phrase else None, truncated=left_open and not phrase)
    contents = [visible[start : min(end, start + MAX_CHARS)].strip() for _, start, end in boxes]
    return Extraction(contents[-1], "box", joined=join_run(visible, boxes, contents), boxes=len(set(contents)))


def join_run(text: str, boxes: list[tuple[int, int, int]], contents: list[str]) -> str | None:
    r"""`\boxed{1}$ and $\boxed{-2}` as `1, -2`: the last boxes, which only connectors separate; None for one box."""
    first = len(boxes) - 1
    while first and len(boxes) - first < 9:
        gap = text[boxes[first - 1][2] + 1 : boxes[first][0]]
        if len(gap) > 40 or not BETWEEN_BOXES.fullmatch(gap):
            break
        first -= 1
    run = list(dict.fromkeys(contents[first:]))
    return ", ".join(run) if len(run) > 1 else None


def last_phrase(text: str) -> str | None:
    """What follows the last "answer is" or "answer:", up to the end of the sentence or the line."""
    last = None
    for last in PHRASE.finditer(text):  # noqa: B007 (the last match is wanted, without a list of all)
        pass
    if last is None:
        return None
    answer = SENTENCE_END.split(last.group(1).strip(), maxsplit=1)[0].strip().strip("*$").strip()
    return answer or None
