"""MATH-500: 500 problems of MATH's test split (Lightman et al. 2023, arXiv 2305.20050)."""

from fura_rl.evaluation.benchmarks.benchmark import Benchmark

BENCHMARK = Benchmark(dataset_name="HuggingFaceH4/MATH-500", prompt_column="problem", answer_column="answer", size=500)
