"""Runs a script with FSDP allowed on a CPU:  accelerate launch --config_file ... fsdp2_on_cpu.py SCRIPT ARGUMENTS...

accelerate 1.15 takes up FSDP for accelerators only (`AcceleratorState.__init__`), though torch's `fully_shard` works
over gloo; only that choice is changed here, nothing of the sharding.
"""

from __future__ import annotations

import os
import runpy
import sys

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType


def allow_fsdp_on_cpu() -> None:
    original = AcceleratorState.__init__

    plugins = []  # the state is shared, and made anew again and again

    def with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
        if fsdp_plugin is not None:
            plugins.append(fsdp_plugin)
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if plugins and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = plugins[-1]

    AcceleratorState.__init__ = with_fsdp


if __name__ == "__main__":
    allow_fsdp_on_cpu()
    del sys.argv[0]
    sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))
    runpy.run_path(sys.argv[0], run_name="__main__")
