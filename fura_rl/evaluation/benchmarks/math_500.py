"""MATH-500: 500 problems of MATH's test split (Lightman et al. 2023, arXiv 2305.20050)."""

from fura_rl.evaluation.benchmarks.benchmark import GREEDY_CONVENTION, GREEDY_ONLY, Benchmark

BENCHMARK = Benchmark(
    dataset_name="HuggingFaceH4/MATH-500",
    revision="6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be",
    prompt_column="problem",
    answer_column="answer",
    group_columns=("level", "subject"),
    size=500,
    sampling=GREEDY_ONLY,
    convention=GREEDY_CONVENTION,
)
