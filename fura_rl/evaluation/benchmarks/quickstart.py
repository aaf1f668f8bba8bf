"""The held-out sums of the embedded quickstart: operand pairs that training never sees."""

from fura_rl.config import QUICKSTART
from fura_rl.evaluation.benchmarks.benchmark import Benchmark
from fura_rl.evaluation.sampling import Sampling

BENCHMARK = Benchmark(
    dataset_name=QUICKSTART,
    prompt_template="{problem}",
    size=400,
    sampling=Sampling(n=8, temperature=1.0, max_tokens=32),
    convention="greedy pass@1 and pass@8 at temperature 1",
)
