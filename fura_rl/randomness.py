"""Where the rollouts' randomness comes from: a pure function of the run's seed and the place in the run.

An engine in this process draws from the process's global generators (torch's; NumPy's with vLLM's second model runner).
Each generation is given its own seed and gives the generators back as they were: what is drawn then depends neither on
what was sampled before nor on where a run was resumed, and the trainer's own draws do not depend on the engine's.
vLLM's seed per request would say the same, but its CPU worker refuses it where a prompt is prefilled in chunks (0.31).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def drawing_from(seed: int) -> Iterator[None]:
    """Draws inside come from `seed`; Python's, NumPy's and torch's generators are as before afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def rollout_seed(seed: int, *, step: int, call: int, training: bool, engine: int) -> int:
    """The seed of the `call`-th generation at optimizer step `step` by the engine with index `engine`."""
    return int(np.random.SeedSequence((seed, step, call, training, engine)).generate_state(1, np.uint64)[0] >> 1)
