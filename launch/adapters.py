"""The adapter methods: what each trains, how many parameters on a given model, its learning rate, what it cannot do.

python launch/adapters.py                                  on the embedded model
python launch/adapters.py --model Qwen/Qwen3-1.7B          on a hub model; nothing but its config is loaded
python launch/adapters.py --match fura                     and the setting that brings each to fura's budget
"""

from __future__ import annotations

import argparse
import logging
import sys


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="quickstart", help="hub id or checkpoint folder [quickstart]")
    parser.add_argument("--lora_r", type=int, default=32, help="rank of LoRA and its relatives [32]")
    parser.add_argument("--match", metavar="METHOD", help="bring every method to this one's number of parameters")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    args = parse(argv)
    try:
        show(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def show(args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table
    from transformers import AutoConfig
    from trl import ModelConfig

    from fura_rl.adapters.budget import count_trained, match_budget
    from fura_rl.adapters.registry import METHODS, find_method
    from fura_rl.config import resolve_model

    config, model_args = AutoConfig.from_pretrained(resolve_model(args.model)), ModelConfig(lora_r=args.lora_r)
    budget = count_trained(args.match, config, model_args) if args.match else None
    columns = ["adapter", "trains", "parameters", "learning rate", "paper", "cannot, or costs"]
    table = Table(*columns, title=f"on {args.model}, lora_r {args.lora_r}", title_justify="left")
    for name, method in METHODS.items():
        settings = match_budget(name, budget, config, model_args) if budget else {}
        count = count_trained(name, config, model_args, adapter_kwargs=settings)
        matched = "".join(f" ({key}={value})" for key, value in settings.items())
        rate = f"{method.paper_learning_rate:g}, {method.rate_of}" if method.paper_learning_rate else "not stated"
        table.add_row(name, method.summary, f"{count:,}{matched}", rate, method.paper, find_method(name).limits)
    Console().print(table)


if __name__ == "__main__":
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of an optional kernel on every import
    sys.exit(main(sys.argv[1:]))
