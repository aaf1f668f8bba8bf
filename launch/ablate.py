"""Compare adapters: every adapter x learning rate x seed of one YAML file, at equal budgets, and a report.

    python launch/ablate.py configs/ablation/quickstart.yaml                      run what is missing, then report
    python launch/ablate.py configs/ablation/quickstart.yaml --processes 2        two cells at a time
    python launch/ablate.py configs/ablation/quickstart.yaml --report_only        the report of what is there

The same command goes on where it was stopped: finished cells are not run again, a killed one continues from its last
checkpoint, a failed one is tried again.  The report is OUTPUT/report.html and OUTPUT/report.md.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec", type=Path, help="YAML file of the ablation")
    parser.add_argument("--output", type=Path, help="folder of cells and report [outputs/ablation/NAME]")
    parser.add_argument("--processes", type=int, default=1, help="cells at a time [1]")
    parser.add_argument("--report_only", action="store_true", help="run nothing")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    args = parse(argv)
    from fura_rl.ablation.report import write_report
    from fura_rl.ablation.results import collect
    from fura_rl.ablation.spec import load_spec
    from fura_rl.ablation.sweep import open_sweep, run_sweep
    from fura_rl.report import environment

    try:
        if args.processes < 1:
            raise ValueError(f"--processes {args.processes} must be at least 1")
        spec = load_spec(args.spec)
        output = args.output or Path("outputs/ablation") / args.spec.stem
        open_sweep(spec, output)
    except (ValueError, TypeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    failed = [] if args.report_only else run_sweep(spec, output, args.processes, lambda line: print(line, flush=True))
    for path in write_report(spec, collect(spec, output), output, environment()):
        print(f"written  {path}")
    return 1 if failed else 0


if __name__ == "__main__":
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of an optional kernel on every import
    sys.exit(main(sys.argv[1:]))
