"""The validation split of multi_step, of operands in training's range, to choose settings on."""

from dataclasses import replace

from fura_rl.evaluation.benchmarks import multi_step

BENCHMARK = replace(multi_step.BENCHMARK, split="validation", size=200)
