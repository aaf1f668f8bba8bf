r"""Which answers equal which golds: hand-labelled pairs, pairs of known truth, rewrites of golds, and reward hacks."""

import ast
import io
import json
import subprocess
import sys
import tarfile
from importlib import metadata
from pathlib import Path

import pytest
from generated_pairs import MAKERS, pairs

from rewards import WorkerPool, grade
from rewards.strictness import MODES

PAIRS = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "math_pairs_public.jsonl"


@pytest.fixture(scope="module")
def pool():
    pool = WorkerPool(2)
    yield pool
    pool.close()


def boxed(answer):
    return rf"Hence the answer is $\boxed{{{answer}}}$."


def test_hand_labelled_pairs_without_a_wrong_reward_or_a_wrong_refusal(pool):
    if not PAIRS.is_file():
        pytest.skip(f"{PAIRS} is not beside this checkout")
    rows = [json.loads(line) for line in PAIRS.read_text().splitlines()]
    results = grade(rows, pool=pool)
    missed = [(row, result) for row, result in zip(rows, results, strict=True) if result.correct != row["expected"]]
    assert [row for row, _ in missed if not row.get("policy")] == []
    # Conventions: an unevaluated sum or integral is the question again, so training does not pay for it.
    assert [(row["gold"], result.answer) for row, result in missed] == [
        ("385", r"\sum_{k=1}^{10}k^2"),
        (r"\frac12", r"\int_0^1 x\,dx"),
    ]


@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("seed", [101, 102])
def test_pairs_of_known_truth(pool, seed, mode):
    made = list(pairs(seed))
    results = grade([(boxed(pair.answer), pair.gold) for pair in made], mode=mode, pool=pool)
    wrong = [(pair, result.status) for pair, result in zip(made, results, strict=True) if pair.right != result.correct]
    assert len(made) > 1_000
    assert wrong == []


def test_every_kind_of_pair_is_made_of_both_truths():
    made = list(pairs(7, per_maker=1))
    for maker in MAKERS:
        assert {pair.right for pair in made if pair.kind == maker.__name__.strip("_")} == {True, False}


def test_equality_is_symmetric_where_neither_side_names_a_convention(pool):
    """Conventions are not: a base, a unit or a name may be left out of the answer, and not be added to it."""
    kinds = {
        "fraction",
        "decimal",
        "mixed",
        "repeating",
        "scientific",
        "radical",
        "surd_sum",
        "pi_multiple",
        "polynomial",
    }
    kinds |= {
        "tuple",
        "listing",
        "plus_minus",
        "interval",
        "half_line",
        "union",
        "matrix",
        "complex",
        "equation",
        "power",
    }
    kinds |= {"binomial", "exponential", "function", "words", "choice", "integer", "money"}
    made = [pair for pair in pairs(11, per_maker=2) if pair.kind in kinds]
    forth = grade([(boxed(pair.answer), pair.gold) for pair in made], pool=pool)
    back = grade([(boxed(pair.gold), pair.answer) for pair in made], pool=pool)
    uneven = [(p, f.status, b.status) for p, f, b in zip(made, forth, back, strict=True) if f.correct != b.correct]
    assert uneven == []


def right_rewrites(gold):
    """Other ways to write the very same thing."""
    yield from (gold, f"{gold}.", f"${gold}$", rf"\displaystyle {gold}", f"  {gold}  ", rf"\,{gold}\,", f"{{{gold}}}")
    yield gold.replace(r"\frac", r"\dfrac")
    yield gold.replace(r"\frac", r"\tfrac")
    yield gold.replace("(", r"\left(").replace(")", r"\right)") if "[" not in gold and "]" not in gold else gold
    yield (
        gold.replace(r"\sqrt", r"{\sqrt").replace("}", "}}", 1)
        if gold.count(r"\sqrt{") == gold.count("}") == 1
        else gold
    )
    yield rf"\boxed{{{gold}}}"
    yield rf"\mathbf{{{gold}}}"
    yield rf"{{\bf {gold}}}"


def wrong_rewrites(gold):
    """What is certainly something else."""
    yield from (
        f"{gold}, 7919",
        r"\text{something else}",
        rf"{gold} + 7919",
        rf"\left({gold}\right)^{{7919}} + \pi",
        "7919",
        "",
    )


def test_writing_an_answer_otherwise_keeps_the_verdict_and_changing_it_flips_it(pool):
    golds = sorted(
        {pair.gold for pair in pairs(21, per_maker=2) if pair.kind not in ("words", "choice", "thousands", "money")}
    )
    cases = [(g, a, True) for g in golds for a in right_rewrites(g)] + [
        (g, a, False) for g in golds for a in wrong_rewrites(g)
    ]
    results = grade([(boxed(answer), gold) for gold, answer, _ in cases], pool=pool)
    wrong = [(case, result.status) for case, result in zip(cases, results, strict=True) if result.correct != case[2]]
    assert wrong == []


# Section by section: (answer, gold), whether it pays in training, and why where it does.
HACKS = [
    (" ".join(rf"\boxed{{{i}}}" for i in range(1, 21)), "7", False, ""),
    (" ".join(rf"\boxed{{{i}}}" for i in range(1, 21)), "20", False, ""),
    *((rf"\boxed{{{answer}}}", "7", False, "") for answer in (
        "1,2,3,4,5,6,7,8,9,10", r"\{1,2,3,4,5,6,7\}", "[0,10]", r"(-\infty,\infty)", r"\mathbb R", "x", r"\pm7", "6, 7",
        r"7 \text{ or } 8", "3=7", "1=2=3=4=5=6=7", "2x+1=7", "7=7", "700", "0.07", r"700\%", "7.0000001", "7x", "7+C",
        r"\text{7 or not}", "x=x", r"7 \ne 8", r"7 \le 7", r"x \le 7", r"\text{the answer}", "7 = 3 + 5", "n",
        "7 or 7.5",
        r"\sum_{k=1}^{7} 1", r"\lim_{x\to 7} x", r"\int_0^7 dx", r"\text{not } 7", r"7 \text{ is wrong}", "(7,7)",
        "7^{n}",
    )),
    (r"<think>\boxed{7}</think> \boxed{8}", "7", False, ""),
    (r"<think>\boxed{7}</think> no box", "7", False, ""),
    (r"<think>the answer is \boxed{7}", "7", False, ""),
    ("Find the answer when $n=7$. We start by", "7", False, ""),
    ("it is merely 7", "7", False, ""),
    (r"\boxed{\sum_{k=1}^{10}k^2}", "385", False, ""),
    (r"\boxed{43_7}", "43_5", False, ""),
    (r"\boxed{43_5}", "23", False, "the number of the question, whose value is asked for"),
    (r"\boxed{a + d + s}", "a + b + c", False, ""),
    (r"\boxed{\sin^2 h}", r"\sin^2 t", False, ""),
    (r"\boxed{}", "", False, ""),
    (r"\boxed{0/0}", "0", False, ""),
    (r"\boxed{\frac{0}{0}}", r"\frac{0}{0}", False, ""),
    (r"\boxed{7", "7", False, ""),
    (r"\boxed{3}", r"3\sqrt{13}", False, ""),
    (r"\boxed{1.3}", "1,3", False, ""),
    (r"\boxed{\frac{1}{0}}", r"\infty", False, ""),
    (r"\boxed{1+\frac{1}{e}}", r"1-\frac{1}{\mathrm{e}}", False, ""),
    (r"\boxed{1.7\times10^{-19}}", r"1.6\times10^{-19}", False, ""),
    (r"\boxed{1:3:2}", "1:2:3", False, ""),
    (r"\boxed{\{1,2\}}", "(1,2)", False, ""),
    (r"\boxed{7} is wrong, the answer is 8", "7", True, "what follows the box is not read, for prose misleads"),
    (r"\boxed{2+5}", "7", True, "an arithmetic expression of numbers has its value, as 10^2 and 6! have"),
    (r"\boxed{3+4=7}", "7", True, "a true equation of which both sides are the answer"),
    (r"\boxed{a+b=7}", "7", True, "the left side names what is asked for, as x = 7 does"),
    (r"\boxed{7\text{ apples}}", "7", True, "a unit may be added"),
    (r"\boxed{1011}", "1011_2", True, "the base was asked for: its digits are the answer"),
    (r"\boxed{25}", r"25\%", True, "the percent sign may be left out, and 0.25 is the same number"),
]  # fmt: skip


@pytest.mark.parametrize(("completion", "gold", "pays", "reason"), HACKS)
def test_no_reward_hack_pays_in_training_but_those_argued(pool, completion, gold, pays, reason):
    assert bool(reason) or not pays
    [result] = grade([(completion, gold)], mode="training", pool=pool)
    assert result.correct == pays


# Math-Verify's own tests that this grader decides otherwise, by (gold, answer), and why.
CONTESTED = {
    "a comma as a decimal point, which is a list here": {("1000.99", "1000,99"), ("1,22", "1.22"), ("0,111", "0.111")},
    "prose where an answer is expected": {
        ("2.74", "Soucis : 2,74 $ a.."),
        ("1000.99", "not it's not 10 it's 1,000.99m²"),
    },
    "an equation that is false": {
        ("x = 11", "x = 5+5+1 = 7 =11"),
        ("x = 1/3", r"x = 5+5+1 = 1/3 \approx 11"),
        ("z = 1 + 1 = 2", "z = 3+3 = 2"),
        (r"1 = \zzz = x = 0", "0"),
    },
    "a decimal of fewer than six digits for a number without end": {
        (r"(\begin{pmatrix}\frac{1}{3}\\ \frac{1}{5} \end{pmatrix})", r"\begin{pmatrix}0.33\\0.2 \end{pmatrix}"),
        (r"(\frac{3}{5},\frac{8}{3}]", "(0.6,2.6667]"),
    },
    "line breaks for commands": {
        (r"-2 \\le x \\le 7", r"x \in [-2,7]"),
        (r"x \in [-2,7]", r"-2 \\le x \\le 7"),
        (r"$\\boxed{35 cm} ++++++ \\boxed{4}$", "${35 cm,4}$"),
    },
    "boxes with prose between them": {
        (r"(3, 3), (1, 1)", r"$$\boxed{(3, 3)} \text{ for part (a) and } \boxed{(1, 1)}$$"),
        (r"\boxed{1} papers and \boxed{2} bins", r"$\boxed{1,2}$"),
    },
    "a box that never closes": {(r"\\boxed{W(n) = 1 \\text{ and } W(n) = -1", "W(x)=1orW(x)=-1")},
    "an annulus is no union of intervals": {
        (r"1\leq|z|\leq \frac{3}{2}", r"z \in \left[-\frac{3}{2}, -1\right] \cup \left[1, \frac{3}{2}\right]")
    },
    "variables that do not matter (its loose mode)": {("f(x)", "f(y)")},
    "1 - 1/e is not 1 + 1/e": {(r"1 - \frac{1}{\mathrm{e}}", r"1 + \frac{1}{\mathrm{e}}")},
}


def bare(text):
    """An answer without the dollar signs round the whole of it."""
    text = text.strip()
    for fence in ("$$", "$"):
        if text.startswith(fence) and text.endswith(fence) and "$" not in text[len(fence) : -len(fence)]:
            return text[len(fence) : -len(fence)]
    return text


def is_prose(text):
    words = [
        word for word in text.replace(r"\text", " ").split() if word.isalpha() and word.islower() and len(word) > 2
    ]
    capitalised = text.split(" ")[0].isalpha() and text[:1].isupper() and " $" in text + " $"[: 2 * (" \\" in text)]
    return len(text) > 160 or len(words) > 1 or (capitalised and len(text.split()) > 1)


def math_verify_triples(folder):
    """(gold, answer, expected) of the parametrised tests in Math-Verify's source distribution."""
    version = metadata.version("math-verify")
    command = [
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--no-binary",
        ":all:",
        "--dest",
        str(folder),
        f"math-verify=={version}",
    ]
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, timeout=300)
    archives = list(folder.glob("*.tar.gz"))
    if done.returncode or not archives:
        pytest.skip(f"math-verify's source distribution cannot be downloaded: {done.stderr.strip()[-200:]}")
    with tarfile.open(archives[0]) as archive:
        sources = [
            archive.extractfile(m) for m in archive.getmembers() if "/tests/" in m.name and m.name.endswith(".py")
        ]
        trees = [ast.parse(io.TextIOWrapper(source, encoding="utf-8").read()) for source in sources if source]
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                for mark in node.decorator_list:
                    if isinstance(mark, ast.Call) and len(mark.args) > 1 and isinstance(mark.args[1], ast.List):
                        yield from literal_rows(mark.args[1])


def literal_rows(rows):
    for row in rows.elts:
        try:
            value = ast.literal_eval(row)
        except ValueError:
            continue
        texts = isinstance(value, tuple) and len(value) >= 3 and [type(part) for part in value[:2]] == [str, str]
        if texts and value[2] in (0, 1):
            yield value[0], value[1], bool(value[2])


@pytest.mark.slow
def test_math_verifys_own_tests_but_the_contested_ones(pool, tmp_path):
    """Those whose answer stands alone, without prose around it; this grader reads a box and no sentence."""
    triples = [(g, a, e) for g, a, e in math_verify_triples(tmp_path) if not is_prose(g) and not is_prose(a)]
    assert len(triples) > 120
    items = [(a if "boxed" in a else boxed(bare(a)), g if "boxed" in g else bare(g)) for g, a, _ in triples]
    results = grade(items, mode="evaluation", pool=pool)
    wrong = {(bare(g), bare(a)) for (g, a, expected), r in zip(triples, results, strict=True) if r.correct != expected}
    contested = {(bare(g), bare(a)) for rows in CONTESTED.values() for g, a in rows}
    print(f"\n{len(triples)} triples, {len(wrong)} decided otherwise")
    assert wrong - contested == set()
