"""The quickstart's validation split, to choose settings on without a look at the test split."""

from dataclasses import replace

from fura_rl.evaluation.benchmarks import quickstart

BENCHMARK = replace(quickstart.BENCHMARK, split="validation", size=200)
