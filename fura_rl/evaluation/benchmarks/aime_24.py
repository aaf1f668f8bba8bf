"""AIME 2024: both papers of the American Invitational Mathematics Examination, answers from 0 to 999."""

from fura_rl.evaluation.benchmarks.benchmark import AVG_AT_8, AVG_CONVENTION, Benchmark

BENCHMARK = Benchmark(
    dataset_name="HuggingFaceH4/aime_2024",
    revision="2fe88a2f1091d5048c0f36abc874fb997b3dd99a",
    split="train",
    prompt_column="problem",
    answer_column="answer",
    size=30,
    greedy=False,
    sampling=AVG_AT_8,
    convention=AVG_CONVENTION,
)
