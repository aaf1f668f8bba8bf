"""AMC 2023: 40 problems of the American Mathematics Competitions 12A and 12B that have a number for an answer."""

from fura_rl.evaluation.benchmarks.benchmark import GREEDY_CONVENTION, GREEDY_ONLY, Benchmark

BENCHMARK = Benchmark(
    dataset_name="math-ai/amc23",
    revision="80815d37005feb82cd7f8fbc6901d5d3eff43057",
    prompt_column="question",
    answer_column="answer",
    size=40,
    sampling=GREEDY_ONLY,
    convention=GREEDY_CONVENTION,
)
