"""A run that is told to end ends with a checkpoint."""

from __future__ import annotations

import logging
import os
import signal
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fura_rl.sync.sharding import several_processes

logger = logging.getLogger(__name__)

# torchrun and, for several processes, accelerate: seconds from a Ctrl-C or SIGTERM to the SIGKILL (torch 2.13: 30)
PATIENCE_OF_LAUNCHER = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"


class SaveOnInterrupt(TrainerCallback):
    """Ctrl-C or SIGTERM ends the run after the step in progress, with a checkpoint; a second Ctrl-C ends it at once.

    A SIGTERM after a Ctrl-C is no second request: `accelerate launch` dies of the first and takes its child along.
    Several processes agree at the end of every step whether one of them was told, so that all of them end with the
    same one.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and "TORCHELASTIC_RUN_ID" in os.environ and not os.getenv(PATIENCE_OF_LAUNCHER):
            logger.warning(
                "the launcher kills this run 30 s after Ctrl-C or SIGTERM, saved or not: export %s=3600 before "
                "`accelerate launch` or torchrun, or however many seconds a step and a checkpoint take",
                PATIENCE_OF_LAUNCHER,
            )
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        if self.received == number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received is None:
            self.received = number
            name = signal.Signals(number).name
            print(f"\n{name}: finishing this step, then saving a checkpoint; Ctrl-C once more to stop now", flush=True)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.received = agreed(self.received, args.device)
        if self.received is not None:
            control.should_save = control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def agreed(received: int | None, device: torch.device) -> int | None:
    """The signal that this process or another one of the run has received, None where none has.  Collective."""
    if not several_processes():
        return received
    number = torch.tensor(received or 0, device=device)
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return int(number) or None
