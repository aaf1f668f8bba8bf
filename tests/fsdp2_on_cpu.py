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

    def with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
        plugin = fsdp_plugin or self.__dict__.get("fsdp_plugin")  # the state is shared, and made anew again and again
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = plugin

    AcceleratorState.__init__ = with_fsdp


if __name__ == "__main__":
    allow_fsdp_on_cpu()
    del sys.argv[0]
    sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))
    runpy.run_path(sys.argv[0], run_name="__main__")
