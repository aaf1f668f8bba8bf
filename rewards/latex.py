r"""One spelling for what people write in many: unicode, font commands, spacing, `\dfrac`, thousands separators.

`normalise` changes how an answer is written, never what it says.  Text stays in `\text{...}`; a unit stays too.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Callable, Iterator

from rewards.extract import BRACE

UNICODE = str.maketrans(
    {
        "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ",
        "∙": r"\cdot ", "÷": "/", "∕": "/", "⁄": "/", "±": r"\pm ", "∓": r"\mp ", "≤": r"\le ", "≥": r"\ge ",
        "≠": r"\ne ",
        "⩽": r"\le ",        "⩾": r"\ge ", "≈": r"\approx ", "∞": r"\infty ", "π": r"\pi ", "∪": r"\cup ",
        "∩": r"\cap ", "∈": r"\in ",
        "∅": r"\emptyset ", "°": r"^{\circ}", "º": r"^{\circ}", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}",
        "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ", "λ": r"\lambda ", "φ": r"\phi ",
        "ω": r"\omega ",        "μ": r"\mu ", "σ": r"\sigma ", "δ": r"\delta ", "Δ": r"\Delta ", "∑": r"\sum ",
        "∏": r"\prod ", "∫": r"\int ",
        "“": '"', "”": '"', "‘": "'", "’": "'", "，": ",", "、": ",", "。": ".", "⟨": r"\langle ", "⟩": r"\rangle ",
    }
)  # fmt: skip
SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
SUPERSCRIPT_RUN, SUBSCRIPT_RUN = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+"), re.compile("[₀₁₂₃₄₅₆₇₈₉]+")
VULGAR_FRACTION = re.compile("[¼½¾⅐-⅞]")
RADICAL = re.compile(r"([√∛])\s*(\d+|[A-Za-z]|\([^()]*\)|\{[^{}]*\})?")

SYNONYMS = {
    **dict.fromkeys(("dfrac", "tfrac", "cfrac", "frac"), r"\frac"),
    **dict.fromkeys(("dbinom", "tbinom", "binom"), r"\binom"),
    **dict.fromkeys(("times", "cdot", "ast", "cdotp", "bullet"), "*"),
    **dict.fromkeys(("leq", "le", "leqslant", "leqq"), r"\le "),
    **dict.fromkeys(("geq", "ge", "geqslant", "geqq"), r"\ge "),
    **dict.fromkeys(("neq", "ne"), r"\ne "),
    **dict.fromkeys(("varnothing", "emptyset"), r"\emptyset "),
    **dict.fromkeys(("vert", "lvert", "rvert", "mid"), "|"),
    **dict.fromkeys(("land", "wedge"), r"\text{ and }"),
    **dict.fromkeys(("lor", "vee"), r"\text{ or }"),
    **dict.fromkeys(("ldots", "dots", "cdots", "dotsc"), r"\ldots "),
    **dict.fromkeys(("approx", "simeq", "doteq"), r"\approx "),
    **dict.fromkeys(("operatorname", "mathrm", "text", "textbf", "textit", "textrm", "textnormal", "textsf"), r"\text"),
    **dict.fromkeys(("mbox", "textsc", "texttt", "textup", "mathop", "hbox"), r"\text"),
    **dict.fromkeys(("mathbf", "boldsymbol", "bm", "mathit", "mathsf", "mathtt", "pmb", "mathnormal"), ""),
    **dict.fromkeys(("boxed", "fbox", "underline", "ensuremath", "smash", "bold"), ""),
    **dict.fromkeys(("displaystyle", "textstyle", "scriptstyle", "limits", "nolimits", "nonumber", "notag"), " "),
    **dict.fromkeys(("quad", "qquad", "thinspace", "enspace", "medspace", "hfill", "strut", "therefore"), " "),
    **dict.fromkeys(("left", "right", "middle", "big", "Big", "bigg", "Bigg", "bigl", "bigr", "Bigl", "Bigr"), ""),
    **dict.fromkeys(("biggl", "biggr", "Biggl", "Biggr", "mleft", "mright"), ""),
    "lg": r"\log_{10}", "lt": "<", "gt": ">", "div": "/", "lbrace": r"\{", "rbrace": r"\}", "lbrack": "[",
    "rbrack": "]",
    "degree": r"^{\circ}", "infin": r"\infty ", "to": r"\to ", "rightarrow": r"\to ", "implies": r"\Rightarrow ",
    "bar": r"\overline", "percent": r"\%", "arctan": r"\arctan ", "imath": "i", "lparen": "(", "rparen": ")",
}  # fmt: skip
INFIX = {r"\over": r"\frac", r"\choose": r"\binom"}  # TeX's own: they take all of their group, before and behind
COMMAND = re.compile(r"\\\\|\\([A-Za-z]+)(?:(?<=operatorname)\*)?|\\[,;:!> ]|\\[()\[\]]|(?<!\\)\$|~|&nbsp;")
THOUSANDS = re.compile(r"(?<=\d)(?:\{,\}|,\s*\\!|\\[,;:! ]|~|\\thinspace\b)\s*(?=\d{3}(?!\d))")
SPACED_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?: \d{3})+(?![\d])")
BARE_NAMES = {"pi": "pi", "Pi": "pi", "theta": "theta", "infinity": "infty", "infty": "infty"}
BARE_NAME = re.compile(r"(?<![\\A-Za-z])(?:pi|Pi|theta|infinity|infty)(?![A-Za-z])")
ASCII_RELATIONS = {"<=": r"\le ", ">=": r"\ge ", "!=": r"\ne ", "=<": r"\le ", "==": "="}
# Whole runs only: of `==<` a part would be read, and the rest another way the next time.
ASCII_RELATION = re.compile(r"(?<![<>=])(?:<=|>=|(?<![0-9)}])!=|=<|==)(?![<>=])")
OLD_FONT = re.compile(r"\{\\(bf|rm|it|sf|tt|cal)\s+")
DROPPED_ARGUMENT = re.compile(r"\\(?:tag|phantom|hphantom|vphantom|label|hspace\*?|vspace\*?|color)\s*\{[^{}]*\}")
COLOURED = re.compile(r"\\textcolor\s*\{[^{}]*\}")
ALIGNED = re.compile(r"\\(?:begin|end)\{(?:aligned?|gathered|split|equation|eqnarray)\*?\}(?:\{[lcr|]*\})?")
ROMAN_LETTERS = re.compile(r"\\text\s*\{\s*([eid])\s*\}")
ROMAN_FUNCTION = re.compile(
    r"\\text\s*\{\s*(sin|cos|tan|cot|sec|csc|ln|log|exp|arcsin|arccos|arctan|gcd|lcm|max|min|det|sinh|cosh|tanh)\s*\}"
)
TEXT_PERCENT = re.compile(r"\\text\s*\{\s*(?:\\?%|percent|per cent|pct)\s*\}|\bper ?cent\b|(?<!\\)%")
SPACE = re.compile(r"\s+")
MAX_PASSES = 4  # two do for all but garbage
TRAILING = " \t\n.,;:*\\"
SCAN = re.compile(r"\\begin\{[^{}]*\}|\\end\{[^{}]*\}|\\(?:langle|rangle)(?![A-Za-z])|\\[A-Za-z]+|\\.|.", re.DOTALL)
OPENERS, CLOSERS = frozenset("([{") | {r"\{", r"\langle"}, frozenset(")]}") | {r"\}", r"\rangle"}


def scan(text: str) -> Iterator[tuple[str, int, int, int]]:
    """Tokens of LaTeX as (token, start, end, depth), the depth of brackets and environments before an opener.

    Interval brackets need not match in kind: `[0, 1)` opens once and closes once.
    """
    depth = 0
    for match in SCAN.finditer(text):
        token = match.group()
        closes = token in CLOSERS or token.startswith(r"\end{")
        depth -= closes
        yield token, match.start(), match.end(), depth
        depth += token in OPENERS or token.startswith(r"\begin{")


def split_top(text: str, is_separator: Callable[[str], bool]) -> list[tuple[str, str]]:
    """Pieces between the separators outside all brackets, each with the separator before it ("" for the first)."""
    pieces, start, before = [], 0, ""
    for token, begin, end, depth in scan(text):
        if depth == 0 and is_separator(token):
            pieces.append((before, text[start:begin]))
            start, before = end, token
    return [*pieces, (before, text[start:])]


def brace_group(text: str, start: int) -> int:
    """The position after the group that opens with the "{" at `start`, or -1 where it never closes."""
    depth = 0
    for match in BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth == 0:
            return match.end()
    return -1


@functools.lru_cache(maxsize=8_192)
def normalise(text: str) -> str:
    """The canonical spelling of the content of a box.  Bounded by the length of the text; never raises.

    One replacement can make room for another (a line break before `912` becomes a space, and the space goes out of
    `1 912`), so they are repeated until nothing moves: a spelling read twice must not have two meanings.
    """
    for _ in range(MAX_PASSES):
        before, text = text, respelled(text)
        if text == before:
            break
    return text


def respelled(text: str) -> str:
    if not text.isascii():
        text = replace_unicode(text)
    text = "".join(c for c in text if c in "\n\t" or not unicodedata.category(c).startswith("C"))
    if any(mark in text for mark in ("\\", "$", "%", "~", "{,}")):
        text = replace_commands(text)
    text = TEXT_PERCENT.sub(r"\\%", text) if "%" in text or "cent" in text or "pct" in text else text
    text = BARE_NAME.sub(lambda match: rf"\{BARE_NAMES[match.group()]} ", text)
    text = ASCII_RELATION.sub(lambda match: ASCII_RELATIONS[match.group()], text)
    text = SPACED_THOUSANDS.sub(lambda match: match.group().replace(" ", ""), text.replace("**", " "))
    return unwrap(SPACE.sub(" ", text))


def replace_unicode(text: str) -> str:
    text = SUPERSCRIPT_RUN.sub(lambda match: "^{" + match.group().translate(SUPERSCRIPTS) + "}", text)
    text = SUBSCRIPT_RUN.sub(lambda match: "_{" + match.group().translate(SUBSCRIPTS) + "}", text)
    text = VULGAR_FRACTION.sub(vulgar_fraction, text)
    text = RADICAL.sub(radical, text)
    return unicodedata.normalize("NFKC", text.translate(UNICODE)).translate(UNICODE)


def vulgar_fraction(match: re.Match[str]) -> str:
    above, _, below = unicodedata.normalize("NFKC", match.group()).partition("⁄")
    return rf"\frac{{{above}}}{{{below}}}"


def radical(match: re.Match[str]) -> str:
    index = "[3]" if match.group(1) == "∛" else ""
    return rf"\sqrt{index}" + "{" + match.group(2).strip("{}") + "}" if match.group(2) else rf"\sqrt{index}"


def replace_commands(text: str) -> str:
    text = THOUSANDS.sub("", text)
    text = OLD_FONT.sub(lambda match: r"\text{" if match.group(1) == "rm" else "{", text)
    text = COLOURED.sub("", DROPPED_ARGUMENT.sub(" ", text))
    if r"\begin" in text and "matrix" not in text and "cases" not in text and ALIGNED.search(text):
        text = ALIGNED.sub(" ", text).replace("&", "").replace(r"\\", " , ")
    text = re.sub(r"\\(?:left|right)\s*\.", " ", text)
    text = COMMAND.sub(rename_command, text)
    text = ROMAN_FUNCTION.sub(r"\\\1 ", ROMAN_LETTERS.sub(r"\1", text))
    text = re.sub(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))", r"^{\\circ}", text)
    text = re.sub(r"\s+(?=[\^_])", "", text)
    return prefixed(text) if any(command in text for command in INFIX) else text


def prefixed(text: str) -> str:
    r"""`{a \over b}` as `{\frac{a}{b}}`, and `\choose` likewise; as it stands where braces or infixes do not fit."""
    groups: list[tuple[list[str], str]] = [([], "")]  # of each open group: its pieces, and what will close its fraction
    for match in re.finditer(r"\\[A-Za-z]+|\\.|.", text, re.DOTALL):
        token, (pieces, end) = match.group(), groups[-1]
        if token == "{":
            groups.append(([], ""))
        elif token == "}":
            groups.pop()
            if not groups:
                return text
            groups[-1][0].append("{" + "".join(pieces) + end + "}")
        elif token in INFIX:
            if end:
                return text
            groups[-1] = [INFIX[token], "{", "".join(pieces).strip(), "}{"], "}"
        elif not (token.isspace() and pieces and pieces[-1] == "}{"):
            pieces.append(token)
    pieces, end = groups[-1]
    return "".join(pieces) + end if len(groups) == 1 else text


def rename_command(match: re.Match[str]) -> str:
    token = match.group()
    if token == r"\\":
        return token
    name = match.group(1)
    if name is None:
        return " " if token[-1] in ",;:!> ~" or token.startswith("&") else ""  # spacing; $ and \( \) \[ \] go
    if name.startswith(("quad", "qquad")):
        return " " + name.removeprefix("q").removeprefix("quad").removeprefix("uad")  # `\\quadx`, as some golds have
    return SYNONYMS.get(name, token)


def unwrap(text: str) -> str:
    """Without surrounding space, closing punctuation, and braces round the whole."""
    while True:
        stripped = text.strip()
        if not stripped.endswith((r"\}", r"\%", r"\$")):
            stripped = stripped.rstrip(TRAILING)
        stripped = stripped.lstrip(" \n\t*,;:")
        if stripped.startswith("{") and (pairs := enclosing_pairs(stripped)):
            stripped = stripped[pairs:-pairs]
        if stripped == text:
            return text
        text = stripped


def enclosing_pairs(text: str) -> int:
    """How many pairs of braces stand round the whole text, one in the other: in one pass, however many."""
    leading = len(text) - len(text.lstrip("{"))
    opened, closed_at = [], [-1] * leading
    for match in BRACE.finditer(text):
        if match.group() == "{":
            opened.append(match.start())
        elif match.group() == "}":
            if not opened:
                return 0
            if (start := opened.pop()) < leading:
                closed_at[start] = match.start()
    last = len(text) - 1
    return next((depth for depth in range(leading) if closed_at[depth] != last - depth), leading)


def brace_arguments(text: str) -> str:
    r"""`\frac12` as `\frac{1}{2}`, `\frac\pi 2` as `\frac{\pi}{2}`, `\sqrt13` as `\sqrt{13}`: for other parsers."""
    pieces, position = [], 0
    for match in re.finditer(r"\\(frac|binom|sqrt)(?![A-Za-z])", text):
        if match.start() < position:
            continue
        pieces.append(text[position : match.end()])
        position = match.end()
        if match.group(1) == "sqrt":
            index = re.compile(r"\s*\[[^\[\]]*\]").match(text, position)
            if index:
                pieces.append(index.group().strip())
                position = index.end()
        for _ in range(1 if match.group(1) == "sqrt" else 2):
            argument, position = read_argument(text, position, whole_number=match.group(1) == "sqrt")
            pieces.append("{" + brace_arguments(argument) + "}")
    return "".join([*pieces, text[position:]])


def read_argument(text: str, position: int, whole_number: bool = False) -> tuple[str, int]:
    """The argument of a command at `position`, without its braces, and where it ends."""
    token = re.compile(r"\s*(?:(\{)|(\\[A-Za-z]+)|(\d+)|(\S)|$)").match(text, position)
    if token is None or not token.group().strip():
        return "", len(text)
    if token.group(1):
        end = brace_group(text, token.start(1))
        return (text[token.end(1) : end - 1], end) if end > 0 else (text[token.end(1) :], len(text))
    if token.group(3):
        end = token.end(3) if whole_number else token.start(3) + 1
        return text[token.start(3) : end], end
    return text[token.end() - len(token.group().strip()) : token.end()], token.end()
