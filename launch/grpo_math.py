"""Train a language model with GRPO on verifiable math rewards, through FuRA or another adapter, with vLLM rollouts.

accelerate launch launch/grpo_math.py                                          the quickstart, minutes on a CPU
accelerate launch launch/grpo_math.py --adapter lora --output_dir outputs/lora  the same with another method
accelerate launch launch/grpo_math.py --config configs/qwen3-1.7b/fura.yaml    the paper's recipe, one GPU
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

BAD_SETTINGS = (ValueError, TypeError, OSError, NotImplementedError)  # what they raise, before training
QUICKSTART_CONFIG = Path(__file__).resolve().parent.parent / "configs" / "quickstart.yaml"


def main(argv: list[str]) -> int:
    from fura_rl.config import DATACLASSES, help_text, parse_arguments

    if {"-h", "--help"} & set(argv):
        print(help_text(__doc__))
        return 0
    if "--help_all" in argv:
        from trl import TrlParser

        TrlParser(DATACLASSES).print_help()
        return 0
    try:
        arguments = parse_arguments(argv, default_config=str(QUICKSTART_CONFIG))
    except BAD_SETTINGS as error:
        return refused(error)
    from fura_rl.checkpoint import a_full_disk_named
    from fura_rl.run import STOPS, die_with_parent, finish, prepare_run, train

    die_with_parent()
    try:
        run = prepare_run(arguments)
    except (*BAD_SETTINGS, *STOPS) as error:  # the latter of a server that is not there, or is another's
        return refused(error)
    try:
        with a_full_disk_named(Path(arguments.training.output_dir)):
            train(run)
            code = finish(run)
    except STOPS as error:
        print(f"\nerror: {error}", file=sys.stderr)  # on a line of its own, below the progress bar
        return 1
    if run.trainer.accelerator.num_processes > 1:
        run.trainer.end()
    return code


def refused(error: Exception) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of an optional kernel on every import
    sys.exit(main(sys.argv[1:]))
