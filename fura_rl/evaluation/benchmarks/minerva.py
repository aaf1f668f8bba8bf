"""Minerva Math: 272 undergraduate science problems of MIT OpenCourseWare (Lewkowycz et al. 2022, arXiv 2206.14858)."""

from fura_rl.evaluation.benchmarks.benchmark import GREEDY_CONVENTION, GREEDY_ONLY, Benchmark

BENCHMARK = Benchmark(
    dataset_name="math-ai/minervamath",
    revision="ee46ddc498933b1977577953250ca5c66be64f96",
    prompt_column="question",
    answer_column="answer",
    size=272,
    sampling=GREEDY_ONLY,
    convention=GREEDY_CONVENTION,
)
