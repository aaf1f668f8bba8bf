"""Grading math answers: `rewards.grade` beside plain math-verify, TRL's `accuracy_reward`, and Pebble with math-verify.

Every grader gets the gold in a box, for a bare gold is misread.  CPU seconds are those of the caller and of its workers
together.  Three sets of items: one kind of answer each; a GRPO step (64 golds x 8 completions, answers mixed as in
MATH); and the same with answers that hang a verifier.  Needs math-verify and TRL; Pebble where it is installed.
"""

from __future__ import annotations

import importlib.util
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fura_rl.benchmark.measure import Settings

GOLDS, ROLLOUTS, PROSE_CHARS = 64, 8, 1_500
SINGLE_KIND_ITEMS, SYMPY_ITEMS, HOSTILE_ITEMS = 60, 300, 100
PEBBLE_SECONDS = 2
# Shares of MATH's golds: 63% integers, 14% fractions, 4% tuples and intervals, 2% words, the rest expressions.
MIX = {
    "integer": 63,
    "fraction": 14,
    "tuple": 2,
    "interval": 2,
    "text": 2,
    "radical": 7,
    "polynomial": 6,
    "exponential": 2,
    "logarithm": 2,
}
HOSTILE = (
    r"\log_{2}(10^{10^{7}})", r"\gcd(10^{10^{7}}, 6^{10^{7}})", r"\sin(10^{10^{10}})", r"\sum_{i=1}^{10^{12}} i^{i}",
    r"9^{9^{9^{9}}}",
)  # fmt: skip


@dataclass(frozen=True)
class Item:
    completion: str
    gold: str  # as the content of a box
    right: bool


def make_answer(kind: str, r: random.Random) -> tuple[str, str, str]:
    """A gold, the same in other words, and a wrong answer."""
    a, b, c = r.randint(2, 99), r.randint(2, 9), r.choice([2, 3, 5, 7])
    return {
        "integer": (str(a), str(a), str(a + b)),
        "fraction": (rf"\frac{{{a}}}{{{b}}}", rf"\frac{{{2 * a}}}{{{2 * b}}}", rf"\frac{{{a + 1}}}{{{b}}}"),
        "decimal": (rf"\frac{{{a}}}{{8}}", f"{a / 8}", f"{a / 8 + 1}"),
        "text": (r"\text{even}", r"\text{even}", r"\text{odd}"),
        "radical": (rf"{a}\sqrt{{{c}}}", rf"\sqrt{{{a * a * c}}}", rf"{a + 1}\sqrt{{{c}}}"),
        "polynomial": (f"x^2+{a + b}x+{a * b}", f"(x+{a})(x+{b})", f"(x-{a})(x+{b})"),
        "tuple": (rf"\left({a},\frac{{{b}}}{{2}}\right)", rf"({a}, \frac{{{2 * b}}}{{4}})", f"({a}, {b})"),
        "interval": (f"[{b},{a + 9})", rf"\left[{b}, {a + 9}\right)", f"[{b}, {a + 9}]"),
        "matrix": (
            rf"\begin{{pmatrix}}{a}&{b}\\{c}&1\end{{pmatrix}}",
            rf"\begin{{pmatrix}} {a} & {b} \\ {c} & 1 \end{{pmatrix}}",
            rf"\begin{{pmatrix}}{a}&{b}\\1&{c}\end{{pmatrix}}",
        ),
        "exponential": (rf"{c}^{{n}}+{a}", rf"{a}+{c}\cdot {c}^{{n-1}}", rf"{c}^{{n}}-{a}"),
        "logarithm": (rf"\ln {a * b}", rf"\ln {a}+\ln {b}", rf"\ln {a}-\ln {b}"),
    }[kind]


KINDS = (
    "integer",
    "fraction",
    "decimal",
    "text",
    "radical",
    "polynomial",
    "tuple",
    "interval",
    "matrix",
    "exponential",
    "logarithm",
)


def of_one_kind(kind: str, count: int, seed: int = 0) -> list[Item]:
    r = random.Random(f"{kind} {seed}")
    made = (make_answer(kind, r) for _ in range(count))
    return [
        Item(complete(right if i % 2 else wrong, r, 0), gold, bool(i % 2))
        for i, (gold, right, wrong) in enumerate(made)
    ]


def grpo_batch(golds: int = GOLDS, hostile_frac: float = 0.0, seed: int = 0) -> list[Item]:
    """Groups of completions: about half right, some wrong ones alike, one in eight unfinished."""
    r = random.Random(f"batch {seed}")
    items = []
    for kind in r.choices(list(MIX), weights=list(MIX.values()), k=golds):
        gold, right, wrong = make_answer(kind, r)
        for _ in range(ROLLOUTS):
            answer = r.choices([right, gold, wrong, None], weights=[2, 2, 3, 1])[0]
            items.append(Item(complete(answer, r, PROSE_CHARS), gold, answer in (right, gold)))
    for index in r.sample(range(len(items)), round(hostile_frac * len(items))):
        items[index] = Item(complete(r.choice(HOSTILE), r, PROSE_CHARS), items[index].gold, right=False)
    return items


def complete(answer: str | None, r: random.Random, chars: int) -> str:
    prose = (
        "We set $x = 3$ and find that $f(x) = x^2 - 2$ grows, so the next case follows from \\[ a + b = c \\] as well. "
    )
    text = (prose * (1 + chars // len(prose)))[: r.randint(chars // 2, chars + chars // 2)] if chars else ""
    return text if answer is None else f"{text}\nThe final answer is $\\boxed{{{answer}}}$."


def plain_math_verify(item: Item) -> bool:
    """As its README has it, with the gold in a box; no protection but its own timeouts of 5 s."""
    from math_verify import parse, verify

    return verify(parse(rf"\boxed{{{item.gold}}}"), parse(item.completion))


def grade_trl(items: list[Item]) -> list[bool]:
    from trl.rewards import accuracy_reward

    completions = [[{"role": "assistant", "content": item.completion}] for item in items]
    return [bool(reward) for reward in accuracy_reward(completions, [f"${item.gold}$" for item in items])]


class Ours:
    """`rewards.grade` with workers of its own, started beforehand as before a training run."""

    def __init__(self, workers: int) -> None:
        from rewards import WorkerPool, grade

        self.pool, self.grade = WorkerPool(workers), grade
        self([Item(r"\boxed{3\ln 2}", rf"\ln {index}", right=False) for index in range(20)])

    def __call__(self, items: list[Item]) -> list[bool]:
        return [result.correct for result in self.grade([(i.completion, i.gold) for i in items], pool=self.pool)]

    def close(self) -> None:
        self.pool.close()


class PebbleMathVerify:
    """A pool that kills: math-verify without its own timeouts, one wall deadline for each item."""

    def __init__(self, workers: int) -> None:
        from pebble import ProcessPool

        self.pool = ProcessPool(max_workers=workers)
        self([Item("2", "2", right=True)] * 20)

    def __call__(self, items: list[Item]) -> list[bool]:
        outcomes = self.pool.map(plain_math_verify, items, timeout=PEBBLE_SECONDS).result()
        verdicts = []
        while True:
            try:
                verdicts.append(bool(next(outcomes)))
            except StopIteration:
                return verdicts
            except Exception:  # the process boundary: a timeout or a dead worker is a wrong answer
                verdicts.append(False)

    def close(self) -> None:
        self.pool.stop()
        self.pool.join()


def cpu_seconds() -> float:
    """CPU time of this process and of every process under it that still runs, and of those that it has waited for."""
    import psutil

    me = psutil.Process()
    own = me.cpu_times()
    total = time.process_time() + own.children_user + own.children_system  # finer than the 10 ms of /proc
    for child in me.children(recursive=True):
        try:
            times = child.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
        except psutil.NoSuchProcess:
            continue
    return total


def forget() -> None:
    """Empty every cache of the caller: a first sight of the batch."""
    from math_verify.parser import parse_latex_cached

    from rewards import expression, grading, ladder, latex, reading, units

    parse_latex_cached.cache_clear()
    grading.VERDICTS.clear()
    for function in (latex.normalise, reading.readings, expression.evaluate, units.split_unit, ladder.gold_answer):
        function.cache_clear()


def measure(call: Callable[[list[Item]], list[bool]], items: list[Item]) -> tuple[float, float, float]:
    """Wall seconds, CPU seconds, and the share of items that are judged rightly."""
    cpu, wall = cpu_seconds(), time.perf_counter()
    verdicts = call(items)
    wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
    return wall, cpu, sum(v == i.right for v, i in zip(verdicts, items, strict=True)) / len(items)


def contenders(hostile: bool) -> dict[str, Callable[[], Any]]:
    """Makers of graders.  TRL's is math-verify in this process, so a hostile batch would only repeat its timeouts."""
    makers: dict[str, Callable[[], Any]] = {
        "rewards, 1 worker": lambda: Ours(1),
        "rewards, 2 workers": lambda: Ours(2),
        "math-verify": lambda: lambda items: [plain_math_verify(item) for item in items],
    }
    if not hostile:
        makers["TRL accuracy_reward"] = lambda: grade_trl
    if importlib.util.find_spec("pebble"):
        makers["Pebble + math-verify, 2 workers"] = lambda: PebbleMathVerify(2)
    return makers


def compare(name: str, items: Callable[[int], list[Item]], rounds: int, hostile: bool = False) -> list[dict[str, Any]]:
    """Every contender on the same items, in turns; round by round other items, each seen twice: cold, then warm."""
    times: dict[str, list[tuple[float, float, float]]] = {}
    for seed in range(rounds):
        batch = items(seed)
        for contender, make in contenders(hostile).items():
            grader = make()
            forget()
            times.setdefault(contender, []).append(measure(grader, batch))
            if contender.startswith("rewards") and name.startswith("GRPO"):
                times.setdefault(f"{contender}, seen before", []).append(measure(grader, batch))
            getattr(grader, "close", lambda: None)()
    count = len(items(0))
    reference = statistics.median(cpu for _, cpu, _ in times["math-verify"])
    return [
        {
            "items": name,
            "grader": contender,
            "per_second": count / statistics.median(wall for wall, _, _ in found),
            "per_cpu_second": count / statistics.median(cpu for _, cpu, _ in found),
            "math_verify_cpu_ratio": reference / statistics.median(cpu for _, cpu, _ in found),
            "right_frac": statistics.mean(right for _, _, right in found),
        }
        for contender, found in times.items()
    ]


def run(settings: Settings) -> list[dict[str, Any]]:
    rounds = max(1, min(5, settings.repeats // 4))
    rows = compare(f"GRPO step, {GOLDS} x {ROLLOUTS}", lambda seed: grpo_batch(seed=seed), rounds)
    for kind in KINDS:
        rows += compare(kind, lambda seed, kind=kind: of_one_kind(kind, SINGLE_KIND_ITEMS, seed), 1)
    rows += compare("only for sympy", lambda seed: of_one_kind("logarithm", SYMPY_ITEMS, seed), min(3, rounds))
    golds = HOSTILE_ITEMS // ROLLOUTS
    for share in (0.0, 0.01, 0.05):
        rows += compare(
            f"{share:.0%} hostile", lambda seed, share=share: grpo_batch(golds, share, seed), 1, hostile=True
        )
    return rows
