r"""Fuzzing: no text raises or hangs in extraction or comparison, and exact values agree with exact arithmetic."""

import importlib.util
import subprocess
import sys
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from rewards import WorkerPool, grade
from rewards.algebra import Value
from rewards.expression import evaluate
from rewards.extract import extract
from rewards.ladder import gold_answer, judge_answer, judge_gold
from rewards.latex import brace_arguments, normalise
from rewards.reading import readings
from rewards.strictness import MODES

FRAGMENTS = [
    r"\frac", r"\dfrac", r"\sqrt", "[3]", "{", "}", "(", ")", "[", "]", r"\{", r"\}", r"\left", r"\right", r"\pm",
    r"\infty",
    r"\pi", r"\text{", r"\text{ and }", r"\mathrm{cm}", r"\%", "%", "^", "_", "=", "<", r"\le", r"\ge", r"\ne",
    r"\in", r"\cup",
    ",", ";", ":", "|", "!", "+", "-", "*", "/", ".", "0", "1", "12", "007", "3.5", "1e9", "x", "y", "i", "e", "n",
    " ", r"\\", "&",
    r"\begin{pmatrix}", r"\end{pmatrix}", r"\begin{cases}", r"\binom", r"\overline{3}", "0.", r"\circ", r"\$", "$",
    r"\,", r"\!",
    r"\boxed{", r"\boxed", r"\fbox{", "<think>", "</think>", "the answer is ", "½", "²", "₅", "√", "−", "°", "π",
    "\u0301", "\u200b",
    "\ud800", "\x00", r"\ldots", r"\sum", r"\int_0^1", r"\log_2", r"\sin", r"\mathbb{R}", r"\approx", "am", "or",
    "and", "no", "A", "(C)",
    r"\langle", r"\rangle", r"\setminus", r"\mid", r"\displaystyle", r"{\bf", r"\tag{1}", "\n", "~", r"\cdot",
    "__import__('os')",
]  # fmt: skip
latex = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=3), max_size=30).map("".join)
unhurried = settings(deadline=2_000, max_examples=150, suppress_health_check=list(HealthCheck), derandomize=True)


@unhurried
@given(latex | st.text(max_size=300))
def test_extraction_never_raises_and_only_quotes(text):
    extraction = extract(text, phrase_fallback=True)
    assert extraction.answer is None or extraction.answer in text
    assert gold_answer(text) is not None


@unhurried
@given(latex, latex, st.sampled_from(sorted(MODES)))
def test_comparison_without_sympy_never_raises(gold, answer, mode):
    assert judge_answer(gold, answer, None, MODES[mode]).status in (
        None,
        "correct",
        "incorrect",
        "unparseable",
        "gold_unparseable",
    )
    judge_gold(gold)


@unhurried
@given(latex)
@example(r"\frac==<")
@example("1\n912")
@example("a$\u03010")
@example(r"\~5")
def test_normalising_twice_changes_nothing_that_is_read(text):
    once = normalise(text)
    assert readings(once) == readings(text) or not readings(text)
    brace_arguments(once)


def test_a_run_of_signs_that_is_no_relation_is_left_as_it_stands():
    assert normalise("x==<5") == "x==<5"
    assert normalise("x==5") == "x=5"
    assert normalise("x=<5") == r"x\le 5"


@unhurried
@given(latex)
def test_what_is_readable_equals_itself(text):
    if readings(text):
        assert judge_answer(text, text, None, MODES["training"]).status in ("correct", None, "incorrect", "unparseable")


@settings(deadline=None, max_examples=30, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.lists(st.tuples(latex, latex), min_size=20, max_size=20))
def test_workers_answer_every_text(fuzz_pool, texts):
    results = grade([(rf"\boxed{{{answer}}}", gold) for answer, gold in texts], pool=fuzz_pool)
    assert len(results) == len(texts)
    assert not [result for result in results if result.status == "crashed"]
    assert fuzz_pool.counters.kills == 0


@pytest.fixture(scope="module")
def fuzz_pool():
    pool = WorkerPool(2)
    yield pool
    pool.close()


@pytest.mark.parametrize("tail", ["", "!", "=", "}", r"\text{x}", "5", "?"])
def test_no_repetition_makes_a_pattern_backtrack_for_ever(tail):
    """`(a+)+` takes years on forty letters: every fragment and every pair of neighbours, repeated, before a tail."""
    pieces = [*FRAGMENTS, *map("".join, pairwise(FRAGMENTS))]
    for piece in [*pieces, "ab", "a b ", "1,", "1 ", "1.1", "x_1", r"\text{a}", r"\text{a}^2", "a/", "3:"]:
        for text in (piece * 60 + tail, "5" + piece * 60 + tail, "x" + piece * 60 + "=" + tail):
            judge_answer("5", text[:400], None, MODES["training"])
            extract("the answer is " + text, phrase_fallback=True)


def leaf(number):
    numerator, denominator = number
    spellings = [
        rf"\frac{{{numerator}}}{{{denominator}}}",
        f"({numerator}/{denominator})",
        rf"\dfrac{{{numerator}}}{{{denominator}}}",
    ]
    if denominator == 1:
        spellings += [str(numerator), f"{numerator}.0", f"({numerator})"]
    return st.tuples(st.sampled_from(spellings), st.just(Fraction(numerator, denominator)))


def combine(children):
    def join(parts):
        (left, x), (right, y), operation = parts
        if operation == "frac":
            return (rf"\frac{{{left}}}{{{right}}}", x / y) if y else (f"({left})*({right})", x * y)
        value = {"+": x + y, "-": x - y, r"\cdot": x * y, "*": x * y}[operation]
        return f"({left}){operation}({right})", value

    return st.tuples(children, children, st.sampled_from(["+", "-", r"\cdot", "*", "frac"])).map(join)


numbers = st.tuples(st.integers(-99, 99), st.integers(1, 20)).flatmap(leaf)
expressions = st.recursive(numbers, combine, max_leaves=8)


@unhurried
@given(expressions)
def test_exact_values_are_those_of_exact_arithmetic(expression):
    text, value = expression
    read = evaluate(normalise(text))
    assert isinstance(read, Value)
    assert read.rational == value


@unhurried
@given(expressions, st.integers(1, 10**6))
def test_a_number_equals_its_other_spellings_and_no_neighbour(expression, off):
    text, value = expression
    gold = rf"\frac{{{value.numerator}}}{{{value.denominator}}}"
    other = value + Fraction(1, off)
    assert judge_answer(gold, text, None, MODES["training"]).status == "correct"
    wrong = rf"\frac{{{other.numerator}}}{{{other.denominator}}}"
    assert judge_answer(gold, wrong, None, MODES["training"]).status == "incorrect"


@unhurried
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 60), st.sampled_from([2, 3, 4]))
def test_radicals_are_canonical(outside, inside, other, degree):
    """a * n-th root of b, written with the factor inside; against another radicand, by comparing n-th powers."""
    root = rf"\sqrt[{degree}]"
    left, right = evaluate(rf"{outside}{root}{{{inside}}}"), evaluate(rf"{root}{{{outside**degree * inside}}}")
    assert left == right
    assert (left == evaluate(rf"{outside}{root}{{{other}}}")) == (inside == other)


ATHERIS_TARGET = """
import sys, atheris
with atheris.instrument_imports(include=["rewards"]):
    from rewards import ladder
    from rewards.extract import extract
    from rewards.strictness import MODES
FRAGMENTS = {fragments!r}

def target(data):
    provider = atheris.FuzzedDataProvider(data)
    texts = []
    for _ in range(2):
        count = provider.ConsumeIntInRange(0, 24)
        parts = [FRAGMENTS[provider.ConsumeIntInRange(0, len(FRAGMENTS) - 1)] for _ in range(count)]
        texts.append("".join(parts) + provider.ConsumeUnicode(6))
    extraction = extract(texts[0], phrase_fallback=True)
    assert extraction.answer is None or extraction.answer in texts[0]
    for mode in MODES.values():
        ladder.judge_answer(texts[0], texts[1], None, mode)
    ladder.judge_gold(texts[0])

atheris.Setup(sys.argv, target)
atheris.Fuzz()
"""


@pytest.mark.slow
def test_atheris_finds_no_crash_and_no_hang(tmp_path):
    """Coverage-guided, 60 seconds; an input that takes over 5 s, or 1 GiB at once, counts as a find.

    Its resident memory cannot be limited: the system counts the most that the process before it, this one, ever held.
    """
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris is not installed; it has wheels for some versions of Python only")
    script = tmp_path / "target.py"
    script.write_text(ATHERIS_TARGET.format(fragments=FRAGMENTS))
    limits = ["-max_total_time=60", "-timeout=5", "-rss_limit_mb=0", "-malloc_limit_mb=1024", "-max_len=200"]
    command = [sys.executable, str(script), *limits]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    print("\n" + done.stderr[-400:])
    assert done.returncode == 0, done.stderr[-4_000:]
