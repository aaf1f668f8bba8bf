"""The table of benchmarks.  A new one is a file here and a line in the table."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from fura_rl.data import LOCAL_FORMATS
from fura_rl.evaluation.benchmarks import math_500, quickstart
from fura_rl.evaluation.benchmarks.benchmark import Benchmark

BENCHMARKS: dict[str, Benchmark] = {
    "quickstart": quickstart.BENCHMARK,
    "math_500": math_500.BENCHMARK,
}


def find_benchmark(name: str) -> Benchmark:
    """The benchmark of this name, or one made of a local JSON, JSONL or Parquet file in MATH-500's schema.

    Raises:
        ValueError: where the name is neither, with the nearest name.
    """
    if name in BENCHMARKS:
        return BENCHMARKS[name]
    if Path(name).suffix in LOCAL_FORMATS:
        return Benchmark(dataset_name=name)
    near = get_close_matches(name, BENCHMARKS, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(
        f"benchmark={name!r} is not one of {', '.join(BENCHMARKS)} nor a .json, .jsonl or .parquet file{hint}"
    )
