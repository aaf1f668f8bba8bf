"""GSM8K: 1,319 grade-school word problems; the gold follows #### (Cobbe et al. 2021, arXiv 2110.14168)."""

from fura_rl.evaluation.benchmarks.benchmark import GREEDY_ONLY, Benchmark

BENCHMARK = Benchmark(
    dataset_name="openai/gsm8k",
    revision="740312add88f781978c0658806c59bc2815b9866",
    dataset_config="main",
    prompt_column="question",
    answer_column="answer",
    size=1319,
    sampling=GREEDY_ONLY,
    convention="greedy pass@1 (arXiv 2110.14168 scores one answer a problem)",
)
