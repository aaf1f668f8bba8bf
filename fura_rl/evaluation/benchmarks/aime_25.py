"""AIME 2025: both papers of the American Invitational Mathematics Examination, answers from 0 to 999."""

from fura_rl.evaluation.benchmarks.benchmark import AVG_AT_8, AVG_CONVENTION, Benchmark

BENCHMARK = Benchmark(
    dataset_name="math-ai/aime25",
    revision="563bb8404243c5f09de6ec262f2db674fe5bce9b",
    prompt_column="problem",
    answer_column="answer",
    size=30,
    greedy=False,
    sampling=AVG_AT_8,
    convention=AVG_CONVENTION,
)
