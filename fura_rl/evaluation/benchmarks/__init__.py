"""The table of benchmarks.  A new one is a file here and a line in the table."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from fura_rl.data import LOCAL_FORMATS
from fura_rl.evaluation.benchmarks import (
    aime_24,
    aime_25,
    amc_23,
    gsm8k,
    math_500,
    minerva,
    multi_step,
    multi_step_validation,
    olympiadbench,
    quickstart,
    quickstart_validation,
)
from fura_rl.evaluation.benchmarks.benchmark import Benchmark

BENCHMARKS: dict[str, Benchmark] = {
    "quickstart": quickstart.BENCHMARK,
    "quickstart_validation": quickstart_validation.BENCHMARK,
    "multi_step": multi_step.BENCHMARK,
    "multi_step_validation": multi_step_validation.BENCHMARK,
    "math_500": math_500.BENCHMARK,
    "aime_24": aime_24.BENCHMARK,
    "aime_25": aime_25.BENCHMARK,
    "amc_23": amc_23.BENCHMARK,
    "minerva": minerva.BENCHMARK,
    "olympiadbench": olympiadbench.BENCHMARK,
    "gsm8k": gsm8k.BENCHMARK,
}


def find_benchmark(name: str) -> Benchmark:
    """The benchmark of this name, or one made of a local JSON, JSONL or Parquet file in MATH-500's schema.

    Raises:
        ValueError: where the name is neither, with the nearest name.
    """
    if name in BENCHMARKS:
        return BENCHMARKS[name]
    if Path(name).suffix in LOCAL_FORMATS:
        return Benchmark(dataset_name=name, group_columns=("level", "subject"))
    near = get_close_matches(name, BENCHMARKS, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(
        f"benchmark={name!r} is not one of {', '.join(BENCHMARKS)} nor a .json, .jsonl or .parquet file{hint}"
    )
