"""The two-step sums of the embedded multi_step task, of operands larger than training ever shows."""

from dataclasses import replace

from fura_rl.evaluation.benchmarks import quickstart
from fura_rl.evaluation.sampling import Sampling

BENCHMARK = replace(
    quickstart.BENCHMARK,
    dataset_name="multi_step",
    size=300,
    sampling=Sampling(n=8, temperature=1.0, max_tokens=40),
)
