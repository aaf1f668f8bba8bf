"""Measure FuRA against its peers, side by side in one process: medians of interleaved runs, ratios, peak memory.

    python launch/benchmark.py layer                     one adapted layer: time (on a GPU as a CUDA graph too), memory
    python launch/benchmark.py convert                   decomposing a layer
    python launch/benchmark.py model                     converting a whole model, and its peak memory
    python launch/benchmark.py fold                      folding a layer for a sync
    python launch/benchmark.py quantize                  error, bits and peak memory of NF4, plain and with FuRA
    python launch/benchmark.py sync                      a sync into a live vLLM engine, here and behind a server
    python launch/benchmark.py survival                  what 16-bit engines leave of the update: trains, takes long
    python launch/benchmark.py soak                      does a run of 2,000 steps grow in memory, files or time?
    python launch/benchmark.py step                      a whole GRPO step on random models
    python launch/benchmark.py rewards                   grading answers: throughput, hostile answers, beside peers
    python launch/benchmark.py all --device cuda --out outputs/benchmark    everything, in under eight minutes

layer, convert, model, fold, step and sync check their results against a float32 reference first, step that they stay
finite too, sync the engine's log-probs against the trainer's in --dtype as well.  A failed check ends the benchmark.
Writes benchmark.json, benchmark.md (the README's tables) and layer.png to --out.  Needs torch, transformers, peft and
accelerate; sync needs vllm, quantize bitsandbytes, the plot matplotlib.  What is missing, and what no longer fits the
time, is skipped with a line.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from pathlib import Path


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ["layer", "convert", "model", "fold", "quantize", "step", "sync", "rewards", "survival", "soak"]
    parser.add_argument("benchmark", choices=[*names, "all"], help="which one, or all")
    parser.add_argument("--device", help="cpu or cuda [cuda where there is one]")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="[bfloat16 on cuda, else float32]")
    parser.add_argument(
        "--autocast",
        action="store_true",
        help="layer, also within all: every layer's forward under autocast of a 16-bit --dtype, as bf16: true trains; "
        "the report says so",
    )
    parser.add_argument("--sizes", nargs="+", help="model sizes: tiny, 3m, qwen3-0.6b, qwen3-1.7b, 7b")
    parser.add_argument(
        "--tokens", type=int, nargs="+", help="tokens of the layer benchmark [64 1024 4096 (16384 on cuda)]"
    )
    parser.add_argument("--repeats", type=int, default=20, help="interleaved runs behind a median [20]")
    parser.add_argument("--seconds", type=float, help="stop repeating a measurement after this long [cuda 1.5, cpu 10]")
    parser.add_argument(
        "--cpu_time", action="store_true", help="CPU seconds of one thread, for a CPU that others use at the same time"
    )
    parser.add_argument("--minutes", type=float, help="begin no measurement after this long [all: 7.5, else no limit]")
    parser.add_argument("--seeds", type=int, default=5, help="seeds of the survival study [5]")
    parser.add_argument(
        "--steps", type=int, help="steps of a run [survival: 50, soak: 2000]; of the drift [1000 syncs]"
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmark"), help="where the results go")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    args = parse(argv)
    import torch

    from fura_rl.benchmark import SHARES, measure_all
    from fura_rl.benchmark.budget import Budget
    from fura_rl.benchmark.measure import Settings
    from fura_rl.benchmark.models import SIZES, layer_shapes

    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    on_gpu = device.type == "cuda"
    sizes = args.sizes or (["qwen3-1.7b", "7b"] if on_gpu else ["qwen3-1.7b"])
    if unknown := sorted(set(sizes) - set(SIZES)):
        print(f"error: --sizes {' '.join(unknown)} is not one of {', '.join(SIZES)}", file=sys.stderr)
        return 2
    if on_gpu and not torch.cuda.is_available():
        print("error: --device cuda, but this torch sees no GPU; use --device cpu", file=sys.stderr)
        return 2
    if args.cpu_time and on_gpu:
        print("error: --cpu_time is for --device cpu; a GPU's time is on the wall", file=sys.stderr)
        return 2
    dtype = getattr(torch, args.dtype or ("bfloat16" if on_gpu else "float32"))
    if args.autocast and args.benchmark not in ("layer", "all"):
        print(f"error: --autocast is for the layer benchmark, and {args.benchmark} would leave it out", file=sys.stderr)
        return 2
    if args.autocast and dtype is torch.float32:
        print("error: --autocast of float32 changes nothing; give --dtype bfloat16 or float16", file=sys.stderr)
        return 2
    if args.cpu_time:
        torch.set_num_threads(1)
    everything = args.benchmark == "all"
    budget = Budget(60 * (args.minutes or (7.5 if everything else float("inf"))))
    settings = Settings(
        device=device,
        dtype=dtype,
        shapes=tuple(dict.fromkeys(shape for size in sizes for shape in layer_shapes(size))),
        tokens=tuple(args.tokens or ([64, 1024, 4096, 16384] if on_gpu else [64, 1024, 4096])),
        repeats=args.repeats,
        seconds=args.seconds or (1.5 if on_gpu else 10.0),
        sizes=tuple(sizes),
        models=tuple(sizes) if on_gpu or args.sizes else ("tiny",),
        autocast=args.autocast,
        clock=time.process_time if args.cpu_time else time.perf_counter,
        budget=budget,
        seeds=args.seeds,
        steps=args.steps or {"survival": 50, "soak": 2000}.get(args.benchmark, 1000),
        out=args.out,
    )
    return measure_all(list(SHARES) if everything else [args.benchmark], settings)


if __name__ == "__main__":
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of an optional kernel on every import
    sys.exit(main(sys.argv[1:]))
