"""Running out of memory, said in words that name the phase and the settings that need less."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

MENDS = {
    "weight sync": "lower vllm_gpu_memory_utilization, which leaves the policy more room, or use vllm_mode=server, "
    "where weights are folded on the engine's device",
    "rollouts": "lower vllm_max_model_length, max_completion_length or the number of completions of a batch "
    "(per_device_train_batch_size x steps_per_generation), or set vllm_enable_sleep_mode=true",
    "training step": "lower per_device_train_batch_size and raise gradient_accumulation_steps by the same factor, set "
    "gradient_checkpointing=true, or lower vllm_gpu_memory_utilization",
}


class OutOfMemory(RuntimeError):
    """Memory ran out in a known phase of the run."""


@contextmanager
def out_of_memory_in(phase: str) -> Iterator[None]:
    """Raises OutOfMemory, naming `phase` and its mend, where an allocation fails in here."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, OutOfMemory) or not ran_out(error):
            raise
        reason = (str(error).strip().splitlines() or ["no more memory"])[0]
        raise OutOfMemory(f"out of memory in the {phase}: {MENDS[phase]}. The allocator says: {reason}") from error


def ran_out(error: BaseException) -> bool:
    """Whether an allocation failed: on a device, in torch's CPU allocator (a plain RuntimeError), or in Python."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
