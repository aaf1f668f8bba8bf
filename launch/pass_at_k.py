"""Score a model or an adapter checkpoint on a math benchmark with vLLM: greedy accuracy and unbiased pass@k.

    python launch/pass_at_k.py                                                 the embedded model and problems
    python launch/pass_at_k.py --model outputs/quickstart                      a trained adapter on the same problems
    python launch/pass_at_k.py --model Qwen/Qwen3-1.7B --benchmark math_500    a hub model on MATH-500
    python launch/pass_at_k.py --model outputs/run --benchmark mine.jsonl      a local file with problem and answer

Writes every sample, with its extracted answer and verdict, to --output.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
from pathlib import Path


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="quickstart", help="hub id, checkpoint or adapter folder [quickstart]")
    parser.add_argument("--base_model", help="base of an adapter whose recorded base has moved")
    parser.add_argument("--benchmark", default="quickstart", help="quickstart, math_500, or a .jsonl/.json/.parquet")
    parser.add_argument("--num_samples", type=int, default=8, help="samples a problem for pass@k [8]")
    parser.add_argument("--k", type=int, nargs="+", default=[1, 8], help="values of k, each at most num_samples [1 8]")
    parser.add_argument("--temperature", type=float, default=1.0, help="sampling temperature of pass@k [1.0]")
    parser.add_argument("--top_p", type=float, default=1.0, help="nucleus of pass@k [1.0]")
    parser.add_argument("--max_tokens", type=int, default=1024, help="longest completion in tokens [1024]")
    parser.add_argument("--max_problems", type=int, help="only the first so many problems")
    parser.add_argument("--seed", type=int, default=0, help="sampling seed [0]")
    parser.add_argument("--dtype", default="auto", help="engine dtype [the checkpoint's]")
    parser.add_argument(
        "--gpu_memory_utilization", type=float, default=None, help="vLLM's share of memory [0.9; CPU 0.1]"
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/pass_at_k.json"), help="where every sample goes")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    args = parse(argv)
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    try:
        return run(args)
    except (ValueError, TypeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(args: argparse.Namespace) -> int:
    from fura_rl.evaluation.benchmarks import find_benchmark
    from fura_rl.evaluation.pass_at_k import check_request, load_problems, print_result, score, start_engine

    benchmark = find_benchmark(args.benchmark)
    check_request(args.k, args.num_samples)
    with tempfile.TemporaryDirectory(prefix="fura-pass-at-k-") as scratch:
        from fura_rl.evaluation.checkpoint import servable_checkpoint

        checkpoint = servable_checkpoint(args.model, args.base_model, Path(scratch))
        problems = load_problems(benchmark, checkpoint, args.max_problems)
        llm = start_engine(checkpoint, args.dtype, args.gpu_memory_utilization, args.seed)
        result = score(llm, problems, args)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print_result(result)
    print(f"every sample  {args.output}")
    return 0


if __name__ == "__main__":
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of an optional kernel on every import
    sys.exit(main(sys.argv[1:]))
