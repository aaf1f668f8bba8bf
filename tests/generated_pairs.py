r"""Answers with a known truth, made from numbers and not from anyone's grader.

Every maker draws a value and writes it as a gold, in other right ways, and in wrong ways.  What is right follows from
arithmetic alone, so a seed that no one has looked at is a fair test of the grader: `pairs(seed)`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from math import comb, gcd


@dataclass(frozen=True)
class Pair:
    kind: str
    gold: str
    answer: str
    right: bool


Made = tuple[str, list[str], list[str]]  # gold, right answers, wrong answers


def frac(q: Fraction, command: str = r"\frac") -> str:
    sign = "-" if q < 0 else ""
    return f"{sign}{command}{{{abs(q.numerator)}}}{{{q.denominator}}}" if q.denominator > 1 else str(q.numerator)


def integer(r: random.Random) -> Made:
    n = r.randint(-999, 9999)
    right = [
        f"{n}.0",
        f"{n}.",
        rf"\text{{{n}}}",
        rf"\mathbf{{{n}}}",
        f"x = {n}",
        f"{n + 7} - 7",
        rf"\frac{{{3 * n}}}{{3}}",
    ]
    return str(n), right, [str(n + 1), str(-n - 1), f"{n}.5", rf"\frac{{{n}}}{{7}}", f"{n}, {n + 1}", f"{n}x", f"{n}0"]


def thousands(r: random.Random) -> Made:
    n = r.randint(10**4, 10**8)
    s = f"{n:,}"
    right = [s, s.replace(",", "{,}"), s.replace(",", r"\,"), s.replace(",", r",\!"), str(n), s.replace(",", " ")]
    return r.choice(right), right, [f"{n + 1000:,}", s.rpartition(",")[0], str(n * 10), s.replace(",", ".")]


def fraction(r: random.Random) -> Made:
    q = Fraction(r.randint(-40, 40) * 2 + 1, r.choice([2, 4, 8, 14, 22, 34, 6]))
    a, b = q.numerator, q.denominator
    right = [
        frac(q, r"\dfrac"),
        frac(q, r"\tfrac"),
        f"{a}/{b}",
        rf"\frac{{{5 * a}}}{{{5 * b}}}",
        rf"\frac{{{-a}}}{{{-b}}}",
    ]
    right += [rf"\left({frac(q)}\right)", rf"\displaystyle {frac(q)}", f"({a})/({b})", f"{frac(q)}."]
    right += [rf"{a} \over {b}", rf"{{{a}\over{b}}}"]
    return frac(q), right, [frac(-q), frac(q + 1), frac(1 / q), rf"\frac{{{a + 1}}}{{{b}}}", str(b), f"{a}"]


def decimal(r: random.Random) -> Made:
    n, places = r.randint(1, 99999), r.randint(1, 4)
    q = Fraction(2 * n + 1, 10**places)
    s = f"{float(q):.{places}f}"
    right = [s + "0", frac(q), s.lstrip("0") if q < 1 else s, rf"{s}\text{{ cm}}", rf"{s}\%" if q > 1 else s]
    return s, right, [f"{float(q) + 10.0**-places:.{places}f}", "-" + s, s + "1", f"{float(q * 10):.{places}f}"]


def mixed(r: random.Random) -> Made:
    w, b = r.randint(1, 30), r.randint(3, 15)
    a = r.choice([k for k in range(1, b) if gcd(k, b) == 1])
    q = w + Fraction(a, b)
    right = [frac(q), rf"{w}\tfrac{{{a}}}{{{b}}}", f"{w} {a}/{b}", rf"{w}+\frac{{{a}}}{{{b}}}"]
    return (
        rf"{w}\frac{{{a}}}{{{b}}}",
        right,
        [rf"\frac{{{a}}}{{{b}}}", rf"\frac{{{w * a}}}{{{b}}}", str(w), frac(q + 1)],
    )


def repeating(r: random.Random) -> Made:
    period, q = r.choice(
        [("3", Fraction(1, 3)), ("27", Fraction(3, 11)), ("142857", Fraction(1, 7)), ("45", Fraction(5, 11))]
    )
    right = [rf"0.\overline{{{period}}}", frac(q), rf"\dfrac{{{q.numerator}}}{{{q.denominator}}}"]
    return r.choice(right), right, ["0." + period[:2], frac(q + Fraction(1, 10)), rf"0.0\overline{{{period}}}"]


def scientific(r: random.Random) -> Made:
    m, e = r.randint(11, 99), r.randint(5, 25) * r.choice([1, -1])
    s = f"{m // 10}.{m % 10}"
    right = [
        rf"{s}\times 10^{{{e}}}",
        rf"{s} \cdot 10^{{{e}}}",
        f"{s}e{e}",
        f"{s}E{e:+d}",
        rf"{m} \times 10^{{{e - 1}}}",
    ]
    wrong = [rf"{s}\times 10^{{{e + 1}}}", rf"{s}\times 10^{{{-e}}}", s, rf"{(m + 1) / 10}\times 10^{{{e}}}"]
    return r.choice(right), right, wrong


def percent(r: random.Random) -> Made:
    n = r.choice([k for k in range(2, 99) if k % 10])
    right = [rf"{n}\%", f"{n}%", rf"{n}\text{{ percent}}", f"{n} percent", rf"{n}.0\%"]
    return rf"{n}\%", right, [rf"{n + 1}\%", rf"{n}00\%", f"0.00{n}", f"{n * 100}", rf"0.{n:02d}\%"]


def unit(r: random.Random) -> Made:
    n = r.randint(2, 900)
    u = r.choice(
        ["cm", "m", "inches", "hours", "kg", "students", "square units", "miles per hour", "dollars", "degrees"]
    )
    right = [
        str(n),
        rf"{n}\text{{ {u}}}",
        rf"{n} \ \text{{{u}}}",
        rf"{n}\,\mathrm{{{u.split()[0]}}}",
        rf"{n}\text{{ {u}}}.",
    ]
    return r.choice([str(n), rf"{n}\text{{ {u}}}"]), right, [str(n + 1), rf"{n * 10}\text{{ {u}}}", rf"{n}x", u]


def degrees(r: random.Random) -> Made:
    n = r.randint(3, 359)
    right = [str(n), rf"{n}^\circ", rf"{n}^{{\circ}}", f"{n}°", rf"{n}\text{{ degrees}}", rf"{n}\degree"]
    return rf"{n}^\circ", right, [rf"{n + 1}^\circ", rf"{360 - n + 360}^\circ", rf"\frac{{{n}}}{{180}}"]


def money(r: random.Random) -> Made:
    cents = r.randint(101, 99999)
    s = f"{cents // 100}.{cents % 100:02d}"
    right = [rf"\${s}", s, rf"\$ {s}", rf"{s}\text{{ dollars}}", rf"\text{{\${s}}}"]
    return rf"\${s}", right, [rf"\${cents}", rf"\${(cents + 1) / 100:.2f}", rf"\${s}1"]


def radical(r: random.Random) -> Made:
    k, n = r.randint(2, 12), r.choice([2, 3, 5, 6, 7, 10, 11, 13, 15])
    right = [
        rf"{k} \sqrt{{{n}}}",
        rf"\sqrt{{{k * k * n}}}",
        rf"{k}\cdot\sqrt{{{n}}}",
        rf"{k}{{\sqrt{{{n}}}}}",
        rf"{k}\cdot {n}^{{1/2}}",
    ]
    right += [rf"\frac{{{k * n}}}{{\sqrt{{{n}}}}}", rf"x={k}\sqrt{{{n}}}"]
    wrong = [
        str(k),
        rf"{n}\sqrt{{{k}}}",
        rf"{k}\sqrt{{{n + 1}}}",
        rf"-{k}\sqrt{{{n}}}",
        rf"{k}+\sqrt{{{n}}}",
        rf"\sqrt{{{k * n}}}",
    ]
    return rf"{k}\sqrt{{{n}}}", right, [w for w in wrong if w != rf"{n}\sqrt{{{k}}}" or n != k]


def surd_sum(r: random.Random) -> Made:
    a, b, n, d = r.randint(1, 9), r.randint(1, 9), r.choice([2, 3, 5, 7]), r.choice([2, 3, 5])
    gold = rf"\frac{{{a}+{b}\sqrt{{{n}}}}}{{{d}}}"
    right = [rf"\frac{{{b}\sqrt{{{n}}}+{a}}}{{{d}}}", rf"\frac{{{a}}}{{{d}}}+\frac{{{b}\sqrt{{{n}}}}}{{{d}}}"]
    right += [rf"\frac{{{2 * a}+{2 * b}\sqrt{n}}}{{{2 * d}}}", rf"({a}+{b}\sqrt{{{n}}})/{d}"]
    return (
        gold,
        right,
        [rf"\frac{{{a}-{b}\sqrt{{{n}}}}}{{{d}}}", rf"\frac{{{a}}}{{{d}}}", rf"\frac{{{a + 1}+{b}\sqrt{{{n}}}}}{{{d}}}"],
    )


def pi_multiple(r: random.Random) -> Made:
    a, b = r.choice([(1, 2), (3, 4), (5, 6), (7, 3), (2, 5), (11, 12)])
    right = [
        rf"\frac{{{a}}}{{{b}}}\pi",
        rf"{a}\pi/{b}",
        rf"\frac{{{2 * a}\pi}}{{{2 * b}}}",
        rf"\dfrac{{{a} \pi}}{{{b}}}",
        rf"\frac{{{a}π}}{{{b}}}",
    ]
    return (
        rf"\frac{{{a}\pi}}{{{b}}}",
        right,
        [rf"\frac{{{a}}}{{{b}}}", rf"\frac{{{b}\pi}}{{{a}}}", rf"\frac{{{a}\pi}}{{{b + 1}}}", r"\pi"],
    )


def polynomial(r: random.Random) -> Made:
    a, b = r.randint(1, 9), r.randint(-9, 9) or 4
    gold = f"x^2{a + b:+d}x{a * b:+d}" if a + b else f"x^2{a * b:+d}"
    right = [f"(x{a:+d})(x{b:+d})", f"{a * b}{a + b:+d}x+x^2", f"x^{{2}}{a + b:+d}x{a * b:+d}", f"(x{b:+d})(x{a:+d})"]
    return (
        gold,
        right,
        [f"(x{a:+d})(x{-b:+d})", f"x^2{a + b + 1:+d}x{a * b:+d}", str(a * b), f"t^2{a + b:+d}t{a * b:+d}"],
    )


def tuple_(r: random.Random) -> Made:
    a, b = r.randint(-9, 9), r.randint(10, 30)
    right = [
        f"({a}, {b})",
        rf"\left({a},{b}\right)",
        f"({a}.0,{b})",
        f"(x,y)=({a},{b})",
        rf"({a},\,{b})",
        f"({a} , {2 * b}/2)",
    ]
    return (
        f"({a},{b})",
        right,
        [f"({b},{a})", f"({a},{b + 1})", f"[{a},{b}]", str(a), f"({a},{b},0)", rf"\{{{a},{b}\}}"],
    )


def listing(r: random.Random) -> Made:
    a, b, c = r.sample(range(-20, 21), 3)
    right = [
        f"{b}, {a}, {c}",
        rf"\{{{c},{b},{a}\}}",
        rf"{a}, {b} \text{{ and }} {c}",
        rf"x={a}, x={b}, x={c}",
        f"{a}, {b}, and {c}",
    ]
    return f"{a}, {b}, {c}", right, [f"{a}, {b}", f"{a}, {b}, {c + 41}", str(a), f"{a}, {b}, {c}, 50", f"{a}{b}{c}"]


def plus_minus(r: random.Random) -> Made:
    a, n = r.randint(1, 9), r.choice([2, 3, 5, 7])
    right = [
        rf"{a}+\sqrt{{{n}}}, {a}-\sqrt{{{n}}}",
        rf"{a} \pm \sqrt{n}",
        rf"x={a}\pm\sqrt{{{n}}}",
        rf"{a}-\sqrt{n}\text{{ or }}{a}+\sqrt{n}",
    ]
    return (
        rf"{a}\pm\sqrt{{{n}}}",
        right,
        [rf"{a}+\sqrt{{{n}}}", str(a), rf"\pm\sqrt{{{n}}}", rf"{a}\pm\sqrt{{{n + 1}}}"],
    )


def interval(r: random.Random) -> Made:
    a, b = r.randint(-9, 3), r.randint(4, 20)
    right = [
        rf"{a} \le x < {b}",
        rf"x\in [{a},{b})",
        rf"\left[{a}, {b}\right)",
        rf"{b} > x \geq {a}",
        rf"{a}\leq t<{b}",
        f"[{a}.0,{b})",
    ]
    return (
        f"[{a},{b})",
        right,
        [f"({a},{b})", f"[{a},{b}]", rf"{a} \le x \le {b}", f"[{a},{b + 1})", f"x<{b}", f"({a},{b}]"],
    )


def half_line(r: random.Random) -> Made:
    a = r.randint(-9, 9)
    right = [rf"({a},\infty)", f"x>{a}", f"{a}<x", rf"({a}, +\infty)", f"2x > {2 * a}", rf"x\in({a},\infty)"]
    return (
        r.choice(right[:3]),
        right,
        [rf"[{a},\infty)", f"x<{a}", rf"x\ge {a}", f"x>{a + 1}", str(a), rf"(-\infty,{a})"],
    )


def union(r: random.Random) -> Made:
    a, b = r.randint(-9, 0), r.randint(1, 9)
    right = [
        rf"(-\infty,{a})\cup({b},\infty)",
        rf"x<{a}\text{{ or }}x>{b}",
        rf"({b}, \infty) \cup (-\infty, {a})",
        f"x < {a} or x > {b}",
    ]
    return (
        right[0],
        right,
        [rf"(-\infty,{a}]\cup[{b},\infty)", rf"({a},{b})", rf"(-\infty,{a})", rf"(-\infty,{a})\cup({b + 1},\infty)"],
    )


def matrix(r: random.Random) -> Made:
    a, b, c, d = r.sample(range(-9, 10), 4)
    right = [
        rf"\begin{{bmatrix}} {a} & {b} \\ {c} & {d} \end{{bmatrix}}",
        rf"\begin{{pmatrix}}{a}.0&{b}\\{c}&{d}\end{{pmatrix}}",
    ]
    wrong = [rf"\begin{{pmatrix}}{a}&{c}\\{b}&{d}\end{{pmatrix}}", rf"\begin{{pmatrix}}{a}&{b}\end{{pmatrix}}", str(a)]
    return rf"\begin{{pmatrix}} {a} & {b} \\ {c} & {d} \end{{pmatrix}}", right, wrong


def complex_(r: random.Random) -> Made:
    a, b = r.randint(1, 20), r.randint(2, 20)
    right = [
        f"{b}i+{a}",
        rf"{a} + {b}\cdot i",
        f"{a}+i{b}" if False else f"{a} + {b} i",
        rf"z={a}+{b}i",
        f"i({b}-{a}i)",
    ]
    return f"{a}+{b}i", right, [f"{a}-{b}i", f"{a}+{b}", str(a), f"{b}+{a}i" if a != b else "i", f"{a}+{b + 1}i"]


def based(r: random.Random) -> Made:
    base = r.choice([2, 3, 5, 8])
    digits = "1" + "".join(r.choice([str(d) for d in range(base)]) for _ in range(4))
    right = [
        f"{digits}_{{{base}}}",
        f"{digits}_{base}",
        rf"{digits}_{{\text{{{dict(zip([2, 3, 5, 8], ['two', 'three', 'five', 'eight'], strict=True))[base]}}}}}",
    ]
    return f"{digits}_{base}", right, [f"{digits}_{base + 1}", f"{digits}1_{base}", f"{digits}_{{10}}"]


def words(r: random.Random) -> Made:
    name = r.choice(["Evelyn", "odd", "Tuesday", "increasing", "no solution", "ellipse", "north", "yes", "isosceles"])
    right = [
        rf"\text{{{name}}}",
        rf"\textbf{{{name}}}",
        rf"\text{{ {name.lower()} }}",
        rf"\mathrm{{{name.replace(' ', '~')}}}",
        name,
    ]
    return rf"\text{{{name}}}", right, [r"\text{other}", r"\text{not " + name + "}", "5", name[0], name[::-1]]


def choice(r: random.Random) -> Made:
    letter, other = r.sample("ABCDE", 2)
    right = [
        letter,
        f"({letter})",
        rf"\text{{{letter}}}",
        rf"\textbf{{({letter})}}",
        rf"\text{{({letter})}}",
        rf"\mathrm{{({letter})}}",
    ]
    return r.choice(right), right, [other, f"({other})", f"{letter}{other}", "5", rf"\text{{{letter} or {other}}}"]


def ratio(r: random.Random) -> Made:
    a, b = r.choice([(3, 4), (2, 7), (5, 8), (9, 4), (1, 6)])
    return (
        f"{a}:{b}",
        [f"{a} : {b}", f"{2 * a}:{2 * b}", rf"\frac{{{a}}}{{{b}}}"],
        [f"{b}:{a}", f"{a}:{b + 1}", str(a), f"{a}{b}"],
    )


def equation(r: random.Random) -> Made:
    m, c = r.randint(2, 9), r.randint(1, 9)
    right = [f"y={c}+{m}x", f"{m}x-y+{c}=0", f"y-{c}={m}x", f"{2 * m}x-2y=-{2 * c}", f"y = {m}x + {c}"]
    return (
        f"y={m}x+{c}",
        right,
        [f"y={m}x-{c}", f"y={c}x+{m}" if c != m else "y=x", f"{m}x+y+{c}=0", f"x={m}y+{c}", str(c)],
    )


def power(r: random.Random) -> Made:
    b, e = r.randint(2, 9), r.randint(20, 90)
    right = [
        str(b**e),
        rf"{b}^{{{e}}}",
        rf"{b}\cdot {b}^{{{e - 1}}}",
        rf"{b * b}^{{{e}/2}}" if e % 2 == 0 else str(b**e),
    ]
    return rf"{b}^{{{e}}}", right, [str(b**e + 1), rf"{b}^{{{e + 1}}}", rf"{e}^{{{b}}}", rf"{b}\cdot {e}"]


def binomial(r: random.Random) -> Made:
    n, k = r.randint(12, 30), r.randint(2, 5)  # n > 2k + 1, else the next one is equal
    return (
        rf"\binom{{{n}}}{{{k}}}",
        [str(comb(n, k)), rf"\dbinom{{{n}}}{{{n - k}}}", rf"{{{n} \choose {k}}}"],
        [rf"\binom{{{n}}}{{{k + 1}}}", str(comb(n, k) + 1), rf"\frac{{{n}}}{{{k}}}"],
    )


def exponential(r: random.Random) -> Made:
    k, c = r.randint(2, 6), r.randint(1, 9)
    right = [rf"-{c}+{k}^{{n}}", rf"{k}\cdot {k}^{{n-1}}-{c}", rf"{k}^n - {c}"]
    return rf"{k}^n-{c}", right, [rf"{k}^{{n-{c}}}", rf"{k}^n+{c}", rf"{k + 1}^n-{c}", rf"{k}n-{c}"]


def function(r: random.Random) -> Made:
    k = r.randint(2, 9)
    gold, right, wrong = r.choice(
        [
            (rf"\ln {2**k}", [rf"{k}\ln 2", rf"{k} \ln{{2}}"], [rf"{k}\ln 3", r"\ln 2", str(k)]),
            (rf"\log_{k} {k**3}", ["3", r"\frac{6}{2}"], ["2", str(k)]),
            (r"\sin 2x", [r"2\sin x\cos x", r"2\cos(x)\sin(x)"], [r"\sin x\cos x", r"2\sin x", r"\cos 2x"]),
            (
                rf"e^{{{k}x}}",
                [rf"(e^x)^{k}", rf"e^{{x}}\cdot e^{{{k - 1}x}}"],
                [rf"{k}e^x", rf"e^{{{k + 1}x}}", rf"e^{k}x"],
            ),
            (rf"\arctan {k}", [rf"\tan^{{-1}} {k}", rf"\arctan({k})"], [rf"\tan {k}", rf"\arctan {k + 1}"]),
            (r"\tan^2 x", [r"\sec^2 x - 1", r"\frac{\sin^2 x}{\cos^2 x}"], [r"\sec^2 x", r"\tan x", r"\sec^2 x+1"]),
        ]
    )
    return gold, right, wrong


MAKERS: tuple[Callable[[random.Random], Made], ...] = (
    integer, thousands, fraction, decimal, mixed, repeating, scientific, percent, unit, degrees, money, radical,
    surd_sum,
    pi_multiple, polynomial, tuple_, listing, plus_minus, interval, half_line, union, matrix, complex_, based, words,
    choice, ratio, equation, power, binomial, exponential, function,
)  # fmt: skip


def pairs(seed: int, per_maker: int = 5) -> Iterator[Pair]:
    """Pairs of every kind; the same seed gives the same pairs."""
    for maker in MAKERS:
        r = random.Random(f"{maker.__name__} {seed}")
        for _ in range(per_maker):
            gold, right, wrong = maker(r)
            for truth, answers in ((True, right), (False, wrong)):
                for answer in dict.fromkeys(answers):
                    yield Pair(maker.__name__.strip("_"), gold, answer, truth)
