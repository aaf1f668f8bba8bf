"""Score a model or an adapter checkpoint on math benchmarks with vLLM: greedy accuracy, pass@k, avg@n, maj@k, pass^k.

    python launch/pass_at_k.py                                                   the embedded model and problems
    python launch/pass_at_k.py --model outputs/quickstart --num_samples 16       a trained adapter on the same problems
    python launch/pass_at_k.py --model Qwen/Qwen3-1.7B --benchmark math_500 aime_24    a hub model, its papers' settings
    python launch/pass_at_k.py --model outputs/run --benchmark mine.jsonl        a local file with problem and answer
    python launch/pass_at_k.py --compare outputs/eval/a outputs/eval/b           what b gains, problem by problem

Every sample goes to a folder as it comes, so a killed run is resumed by the same command and generates nothing twice.
--rerun FOLDER repeats an evaluation from its folder.  Benchmarks: quickstart, multi_step, math_500, aime_24, aime_25,
amc_23, minerva, olympiadbench, gsm8k, or a .json, .jsonl or .parquet file.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fura_rl.evaluation.benchmarks.benchmark import Benchmark
    from fura_rl.evaluation.problems import Problem
    from fura_rl.evaluation.run_folder import RunFolder
    from fura_rl.evaluation.sampling import Sampling

ARGUMENTS = "arguments.json"


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="quickstart", help="hub id, checkpoint or adapter folder [quickstart]")
    parser.add_argument("--base_model", help="base of an adapter whose recorded base has moved")
    parser.add_argument("--benchmark", nargs="+", default=["quickstart"], help="one or more [quickstart]")
    parser.add_argument("--num_samples", type=int, help="samples a problem, 0 for greedy alone [the benchmark's]")
    parser.add_argument("--k", type=int, nargs="+", help="values of k, each at most num_samples [1 2 4 ... n]")
    parser.add_argument("--temperature", type=float, help="sampling temperature [the benchmark's]")
    parser.add_argument("--top_p", type=float, help="nucleus [the benchmark's]")
    parser.add_argument("--max_tokens", type=int, help="longest completion in tokens [the benchmark's; 1024]")
    parser.add_argument("--no_greedy", action="store_true", help="leave out the greedy pass")
    parser.add_argument("--no_chat_template", action="store_true", help="ask in plain text: for base models")
    parser.add_argument("--allow_duplicates", action="store_true", help="accept problems that occur twice")
    parser.add_argument("--max_problems", type=int, help="only the first so many problems")
    parser.add_argument("--seed", type=int, default=0, help="sampling seed [0]")
    parser.add_argument("--dtype", default="auto", help="engine dtype [the checkpoint's]")
    parser.add_argument("--gpu_memory_utilization", type=float, help="vLLM's share of memory [0.9; CPU 0.1]")
    parser.add_argument("--output", type=Path, help="folder of the evaluation [outputs/eval/MODEL]")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("A", "B"), help="two folders: what B gains over A")
    parser.add_argument("--rerun", type=Path, metavar="FOLDER", help="repeat that evaluation into --output")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    args = parse(argv)
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    try:
        return show_comparison(*args.compare) if args.compare else run(repeated(args))
    except (ValueError, TypeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def repeated(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments of the evaluation that --rerun names, else those given."""
    if args.rerun is None:
        return args
    file = args.rerun / ARGUMENTS
    if not file.is_file() or args.output is None:
        raise ValueError(f"--rerun needs a folder with {ARGUMENTS}, and --output, a folder of its own")
    return argparse.Namespace(**(vars(args) | json.loads(file.read_text())))


def run(args: argparse.Namespace) -> int:
    from transformers import AutoTokenizer

    from fura_rl.evaluation.benchmarks import find_benchmark
    from fura_rl.evaluation.checkpoint import servable_checkpoint
    from fura_rl.evaluation.pass_at_k import (
        check_lengths,
        choose_ks,
        plan_batches,
        plan_passes,
        print_summary,
        sample_all,
        score,
        start_engine,
    )
    from fura_rl.report import write_json

    output = args.output or Path("outputs/eval") / Path(args.model).name
    benchmarks = {name: find_benchmark(name) for name in args.benchmark}
    overrides = {"n": args.num_samples, "temperature": args.temperature, "top_p": args.top_p, "seed": args.seed}
    overrides["max_tokens"] = args.max_tokens
    passes = {
        name: plan_passes(benchmark, greedy=False if args.no_greedy else None, **overrides)
        for name, benchmark in benchmarks.items()
    }
    ks = {name: choose_ks(args.k, chosen) for name, chosen in passes.items()}
    with tempfile.TemporaryDirectory(prefix="fura-pass-at-k-") as scratch:
        checkpoint = servable_checkpoint(args.model, args.base_model, Path(scratch))
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        jobs = []
        for name, benchmark in benchmarks.items():  # all checks of all benchmarks before the engine starts
            problems = ask(args, benchmark, tokenizer)
            check_lengths(checkpoint, tokenizer, problems, passes[name])
            jobs.append((open_folder(args, output, name, benchmark, problems, passes[name], ks[name]), problems))
        recorded = {key: value for key, value in vars(args).items() if key not in ("output", "compare", "rerun")}
        write_json(output / ARGUMENTS, recorded)
        llm = start_engine(checkpoint, args.dtype, args.gpu_memory_utilization, args.seed)
        for (name, benchmark), (folder, problems) in zip(benchmarks.items(), jobs, strict=True):
            sample_all(llm, tokenizer, problems, plan_batches(len(problems), passes[name]), folder)
            summary = score(folder, problems, ks[name])
            print_summary(summary, f"{args.model} on {name}", passes[name], benchmark.convention)
            print(f"every sample  {folder.path / 'samples.jsonl'}")
    return 0


def ask(args: argparse.Namespace, benchmark: Benchmark, tokenizer: Any) -> list[Problem]:
    from fura_rl.evaluation.problems import load_problems

    if args.max_problems is not None and args.max_problems < 1:
        raise ValueError(f"--max_problems {args.max_problems} must be at least 1")
    return load_problems(
        benchmark,
        tokenizer,
        max_problems=args.max_problems,
        chat=not args.no_chat_template,
        allow_duplicates=args.allow_duplicates,
    )


def open_folder(
    args: argparse.Namespace, output: Path, name: str, benchmark: Benchmark, problems: list[Problem],
    passes: dict[str, Sampling], ks: list[int],
) -> RunFolder:  # fmt: skip
    """The benchmark's folder below `output`, which must be new or hold the same evaluation."""
    from fura_rl.evaluation.problems import content_hash
    from fura_rl.evaluation.run_folder import RunFolder
    from fura_rl.report import environment

    settings = {
        "model": args.model,
        "base_model": args.base_model,
        "benchmark": name,
        "dataset": asdict(benchmark),
        "problems": len(problems),
        "content_hash": content_hash(problems),
        "passes": {key: asdict(sampling) for key, sampling in passes.items()},
        "ks": ks,
        "dtype": args.dtype,
        "chat_template": not args.no_chat_template,
    }
    return RunFolder.open(output / Path(name).stem, settings, environment())


def show_comparison(first: Path, second: Path) -> int:
    from rich.console import Console
    from rich.table import Table

    from fura_rl.evaluation.compare import compare
    from fura_rl.evaluation.pass_at_k import add_scores

    for comparison in compare(first, second):
        table = Table("measure", title=f"{comparison.benchmark}: {second} minus {first}", title_justify="left")
        table.add_column("difference", justify="right")
        table.add_column("95% interval", justify="right")
        add_scores(table, comparison.differences, signed=True)
        Console().print(table)
        print(f"{comparison.problems} problems, paired bootstrap over problems")
    return 0


if __name__ == "__main__":
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of an optional kernel on every import
    sys.exit(main(sys.argv[1:]))
