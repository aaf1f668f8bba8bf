"""The held-out sums of the embedded quickstart: operand pairs that training never sees."""

from fura_rl.config import QUICKSTART
from fura_rl.evaluation.benchmarks.benchmark import Benchmark

BENCHMARK = Benchmark(dataset_name=QUICKSTART, prompt_template="{problem}")
