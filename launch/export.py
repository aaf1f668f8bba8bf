"""Turn an adapter checkpoint into one that needs no fura_rl: its policy as a plain model, or a LoRA close to it.

    python launch/export.py outputs/quickstart outputs/folded                      a plain Hugging Face checkpoint
    python launch/export.py outputs/quickstart outputs/lora --lora_rank 16         the nearest LoRA of rank 16
    python launch/export.py outputs/run outputs/folded --dtype bfloat16 --base_model Qwen/Qwen3-1.7B

A folded model computes what the policy computes; the largest difference of log-probs on a few tokens is measured and
stated.  A LoRA holds the best rank-r part of each layer's update, and the error is stated.  Both get a model card.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", help="folder of an adapter checkpoint")
    parser.add_argument("output", type=Path, help="new folder for the export")
    parser.add_argument("--base_model", help="base of an adapter whose recorded base has moved")
    parser.add_argument("--dtype", default="auto", help="dtype of the folded weights [the base's]")
    parser.add_argument("--lora_rank", type=int, help="write a LoRA of this rank instead of a folded model")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    args = parse(argv)
    try:
        from fura_rl.export import export

        print(export(args.adapter, args.output, args.base_model, args.dtype, args.lora_rank))
    except (ValueError, TypeError, OSError, NotImplementedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of an optional kernel on every import
    sys.exit(main(sys.argv[1:]))
