"""OlympiadBench: its 674 open-ended English competition problems in text alone (He et al. 2024, arXiv 2402.14008)."""

from fura_rl.evaluation.benchmarks.benchmark import GREEDY_ONLY, Benchmark

BENCHMARK = Benchmark(
    dataset_name="Hothan/OlympiadBench",
    revision="91184b52131e7fc9455fef848035173aea8cc01a",
    dataset_config="OE_TO_maths_en_COMP",
    split="train",
    prompt_column="question",
    answer_column="final_answer",
    group_columns=("subfield", "answer_type"),
    size=674,
    sampling=GREEDY_ONLY,
    convention="greedy pass@1 (arXiv 2402.14008)",
)
