"""Runs a script with DeepSpeed allowed on a CPU:  accelerate launch --config_file ... deepspeed_on_cpu.py SCRIPT ...

accelerate 1.15 takes up DeepSpeed only where it finds an accelerator to choose a backend for
(`PartialState._prepare_backend`), though DeepSpeed itself runs over gloo; only that choice is changed here.
"""

from __future__ import annotations

import os
import runpy
import sys

from accelerate.state import PartialState
from accelerate.utils import DistributedType


def asked_for_deepspeed() -> bool:
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def allow_deepspeed_on_cpu() -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_CPU)


if __name__ == "__main__":
    allow_deepspeed_on_cpu()
    del sys.argv[0]
    sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))
    runpy.run_path(sys.argv[0], run_name="__main__")
