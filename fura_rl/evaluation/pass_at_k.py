"""pass@k of one model on one benchmark: problems, engine, samples, table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from fura_rl.data import load_splits, pick_split, prepare
from fura_rl.evaluation.benchmarks.benchmark import Benchmark
from fura_rl.evaluation.sampling import Evaluation, Sampling, evaluate
from fura_rl.report import environment
from fura_rl.sync.vllm_engine import cpu_cache_settings

if TYPE_CHECKING:
    import argparse

    from transformers import PreTrainedTokenizerBase
    from vllm import LLM


@dataclass(frozen=True)
class Problems:
    """The prepared problems of a benchmark: prompts, golds, and the tokenizer they were made for."""

    prompts: list[Any]
    golds: list[str]
    tokenizer: PreTrainedTokenizerBase


def check_request(ks: Sequence[int], num_samples: int) -> None:
    """Raises ValueError where some pass@k cannot be estimated from so many samples."""
    bad = [k for k in ks if not 1 <= k <= num_samples]
    if bad:
        raise ValueError(
            f"--k {' '.join(map(str, bad))} needs 1 <= k <= num_samples={num_samples}; raise --num_samples"
        )


def load_problems(benchmark: Benchmark, checkpoint: str, max_problems: int | None) -> Problems:
    """Raises ValueError where the benchmark has no such split, the wrong size, or unreadable golds."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    script = benchmark.script_arguments()
    dataset = pick_split(load_splits(script), benchmark.split, benchmark.dataset_name)
    if benchmark.size is not None and len(dataset) != benchmark.size:
        raise ValueError(f"{benchmark.dataset_name} has {len(dataset)} problems, expected {benchmark.size}")
    if max_problems is not None:
        dataset = dataset.select(range(min(max_problems, len(dataset))))
    prepared = prepare(dataset, script, tokenizer, benchmark.dataset_name)
    return Problems(list(prepared["prompt"]), list(prepared["answer"]), tokenizer)


def start_engine(checkpoint: str, dtype: str, memory_utilization: float | None, seed: int) -> LLM:
    """A vLLM engine in this process."""
    from vllm import LLM
    from vllm.platforms import current_platform

    on_cpu = current_platform.is_cpu()
    memory_utilization = memory_utilization or (0.1 if on_cpu else 0.9)
    return LLM(
        model=checkpoint,
        dtype=dtype,
        seed=seed,
        enforce_eager=on_cpu,
        gpu_memory_utilization=memory_utilization,
        disable_log_stats=True,
        **(cpu_cache_settings(memory_utilization) if on_cpu else {}),
    )


def score(llm: LLM, problems: Problems, args: argparse.Namespace) -> dict[str, Any]:
    """Greedy and sampled evaluation as one JSON-ready record that holds every sample."""
    shared = {"max_tokens": args.max_tokens, "seed": args.seed}
    samplings = {
        "greedy": Sampling(n=1, temperature=0.0, **shared),
        "sampled": Sampling(n=args.num_samples, temperature=args.temperature, top_p=args.top_p, **shared),
    }
    evaluations: dict[str, Evaluation] = {
        name: evaluate(llm, problems.tokenizer, problems.prompts, problems.golds, sampling)
        for name, sampling in samplings.items()
    }
    sampled = evaluations["sampled"]
    return {
        "model": args.model,
        "benchmark": args.benchmark,
        "problems": len(problems.prompts),
        "greedy_accuracy": evaluations["greedy"].pass_at(1),
        "pass_at_k": {str(k): sampled.pass_at(k) for k in args.k},
        "truncated_frac": sampled.truncated_frac,
        "no_answer_frac": sampled.no_answer_frac,
        "phrase_correct_frac": sampled.phrase_correct_frac,
        "ungraded_frac": sampled.ungraded_frac,
        "sampling": {name: asdict(sampling) for name, sampling in samplings.items()},
        "environment": environment(),
        "samples": {name: evaluation.rows() for name, evaluation in evaluations.items()},
    }


def print_result(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    sampling = result["sampling"]["sampled"]
    table = Table(title=f"{result['model']} on {result['benchmark']}", title_justify="left")
    table.add_column("measure")
    table.add_column("value", justify="right")
    table.add_row("greedy accuracy", f"{result['greedy_accuracy']:.3f}")
    for k, value in result["pass_at_k"].items():
        table.add_row(f"pass@{k}", f"{value:.3f}")
    table.add_row("cut at max_tokens", f"{result['truncated_frac']:.1%}")
    table.add_row("without a boxed answer", f"{result['no_answer_frac']:.1%}")
    table.add_row("right in words, without a box (not counted)", f"{result['phrase_correct_frac']:.1%}")
    table.add_row("not graded (timeout, memory, crash)", f"{result['ungraded_frac']:.1%}")
    conditions = (
        f"{result['problems']} problems, {sampling['n']} samples each, temperature {sampling['temperature']:g}, "
        f"top-p {sampling['top_p']:g}, max {sampling['max_tokens']} tokens"
    )
    console = Console()
    console.print(table)
    console.print(conditions, highlight=False)
