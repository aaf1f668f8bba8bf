"""TRL's AsyncGRPO on our weight sync: any adapter, folded in the engine, the policy's base weights never written.

    trainer = FuraAsyncGRPOTrainer(model, reward_funcs, args=AsyncGRPOConfig(...), peft_config=FuraConfig(...), ...)

Start the server with `launch/serve_rollouts.py`; it needs no flag beyond those it sets.  TRL's own sync merges the
adapter into the live policy, streams every weight over NCCL while the server stands still, and unmerges; this one
stages small factors while rollouts go on and pauses only around the commit.  Rollouts in flight then go on from the
new policy, their keys and values computed anew, and TRL keeps the log-prob that each token was sampled with.

A server that died comes back with the base model, and TRL's worker goes on asking it for rollouts, which it labels with
the policy's version.  So every rollout is vouched for after it was sampled, and those that nobody can vouch for are
made too old for TRL to take.

With `fura_rl/trainer.py` the only file that touches TRL's private names.  Read in TRL 1.16.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import nn
from trl.experimental.async_grpo import AsyncGRPOTrainer

from fura_rl.alarms import Alarms, AlarmSettings
from fura_rl.serve import TOKEN_VARIABLE
from fura_rl.sync.engine import RolloutEngine
from fura_rl.sync.http_transport import HttpTransport
from fura_rl.sync.probe import trainer_logprobs
from fura_rl.sync.remote_engine import Follower, RemoteEngine
from fura_rl.sync.sharding import failing_together
from fura_rl.sync.transport import Transport
from fura_rl.sync.weight_sync import SyncReport, WeightSync
from fura_rl.trainer import keep_core_dtype, probe_token_ids

TRL_VERSIONS_READ = "1.16"
PRIVATE_NAMES = (
    "def _sync_weight_merged(", "self._metrics", "weight_transfer.send_weights(", "rollout_queue=self.rollout_queue",
    "sample = self.queue.get(timeout=", "version = self.model_version_fn()", "if staleness > self.max_staleness:",
)  # fmt: skip

logger = logging.getLogger(__name__)


class FactoredWeightTransfer:
    """TRL's `WeightTransferProtocol` around a `WeightSync`, which stages, pauses, commits and resumes by itself.

    TRL's calls to `pause` and `resume` therefore do nothing: the server generates until the commit.  `sync` is set
    once there is a policy; every process of the trainer holds one, though TRL itself keeps the transfer on the first.
    """

    def __init__(self) -> None:
        self.sync: WeightSync | None = None
        self.reports: list[SyncReport] = []

    def init_weight_transfer(self) -> None:
        """The server was claimed when `sync` was made."""

    def pause(self) -> None:
        """Only around the commit, see `RemoteEngine`."""

    def send_weights(self, iterator: Iterable[tuple[str, torch.Tensor]] = ()) -> None:
        """Bring the server to the policy's weights and prove it.

        TRL's `iterator` of the policy's parameters is never advanced: each step of it would gather a base weight.
        Collective: every process must call this.

        Raises:
            StaleEngineError, EngineLostError, RemoteSyncError, FloatingPointError: see `WeightSync.sync`.
        """
        self.reports.append(self.sync.sync())

    def resume(self) -> None:
        """See `pause`."""

    def destroy(self) -> None:
        """Give the server back, so that another trainer need not wait for the lease to end."""
        if self.sync is not None and isinstance(self.sync.engine, RemoteEngine):
            self.sync.engine.close()


class RestartableEngine(RemoteEngine):
    """A server that tells when it had other weights than the policy's and got them back, in a sync or between two.

    `on_restored` is called as soon as what it samples is the policy's again.
    """

    def __init__(self, transport: Transport, on_restored: Callable[[], None]) -> None:
        super().__init__(transport)
        self._on_restored = on_restored

    def restore(self, timeout: float) -> dict[str, float]:
        phases = super().restore(timeout)
        self._on_restored()
        return phases

    def resend(self) -> None:
        """Also disowns what was sampled in between, from weights that the proof has not accepted."""
        super().resend()
        self._on_restored()


class VouchedQueue:
    """TRL's queue of rollouts, which has the server looked at after a rollout was sampled and before it is taken.

    A server that is then the process that was claimed, and holds the last version, has sampled it from the policy.  One
    that is not is restored, which leaves the rollout too old for TRL to take, see `_disown_rollouts`.
    """

    def __init__(self, rollouts: Any, engine: RemoteEngine) -> None:
        self.rollouts = rollouts
        self.engine = engine
        self._seen = 0  # rollouts at the head that were there before the last look, which holds for them too

    def qsize(self) -> int:
        return self.rollouts.qsize()

    def get(self, timeout: float) -> Any:
        """The next rollout.

        Raises:
            queue.Empty: where there is none within `timeout`.
            EngineLostError, RemoteSyncError: where the server lost the policy and cannot be brought back to it.
        """
        rollout = self.rollouts.get(timeout=timeout)
        if self._seen:
            self._seen -= 1
            return rollout
        self._seen = self.rollouts.qsize()
        if not self.engine.serves_last():
            self.engine.restore(self.engine.transport.timeout)
        return rollout


class FuraAsyncGRPOTrainer(AsyncGRPOTrainer):
    """`AsyncGRPOTrainer` whose rollout server provably serves the policy that is trained.

    Takes TRL's arguments unchanged, `weight_transfer` excepted; `peft_config` is any PEFT config, or None for full
    fine-tuning.  `sync_settings` are keyword arguments of `WeightSync`, e.g. `{"probe_every": 1}`, `alarms` the
    thresholds of its alarms.  Logs `sync/*` at every sync and `alarms/*` with every line.

    Raises:
        ValueError: where a token is set, which TRL's rollout worker cannot send.
        EngineLostError: where the server is not up within `args.vllm_server_timeout`.
        RemoteSyncError: where it serves another base model, or belongs to another trainer.
    """

    def __init__(
        self,
        *args: Any,
        sync_settings: dict[str, Any] | None = None,
        alarms: AlarmSettings | None = None,
        **kwargs: Any,
    ) -> None:
        refuse_token()
        check_layout()
        transfer = FactoredWeightTransfer()
        super().__init__(*args, weight_transfer=transfer, **kwargs)
        policy = self.accelerator.unwrap_model(self.model)
        keep_core_dtype(policy)
        mixed = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision)
        transfer.sync = WeightSync(
            policy,
            self._rollout_engine(),
            probe_token_ids(self.train_dataset, self.processing_class),
            seed=self.args.seed,
            compute_dtype=mixed or policy.dtype,
            score=self._score,
            **{"audit_every": None} | (sync_settings or {}),  # rollouts go on all the while
        )
        self.transfer = transfer
        if self.accelerator.is_main_process:
            self.rollout_queue = VouchedQueue(self.rollout_queue, transfer.sync.engine)
        self.alarms = Alarms(alarms or AlarmSettings())
        self.callback_handler.callbacks.insert(0, self.alarms)  # before the reporters, which shall see its counters

    def _rollout_engine(self) -> RolloutEngine:
        """The server as this process sees it: the first talks to it, the others gather along."""
        engine, dtype = None, [None]
        with failing_together():
            if self.accelerator.is_main_process:
                transport = HttpTransport(self.args.vllm_server_base_url, timeout=self.args.vllm_server_timeout)
                transport.wait_until_up(self.args.vllm_server_timeout)
                engine = RestartableEngine(transport, self._disown_rollouts)
                dtype = [str(engine.dtype).removeprefix("torch.")]
        broadcast_object_list(dtype, from_process=0)
        return engine or Follower(getattr(torch, dtype[0]))

    def _score(self, policy: nn.Module, token_ids: Sequence[int]) -> torch.Tensor:
        """Log-probs through TRL's tree attention, of which one sequence is a tree without branches."""
        count = len(token_ids)
        device = next(policy.parameters()).device
        ends = torch.tensor([0, count], dtype=torch.int32, device=device)
        positions = torch.arange(count, device=device)
        tree = {
            "position_ids": positions[None], "tree_kv_index": positions, "tree_cu_seqlens_q": ends,
            "tree_cu_seqlens_k": ends, "tree_max_seqlen_q": count, "tree_max_seqlen_k": count,
        }  # fmt: skip
        with self.accelerator.autocast():
            return trainer_logprobs(policy, token_ids, **tree)

    def _disown_rollouts(self) -> None:
        """Count so far on that TRL drops, as too old, every rollout that is queued or under way."""
        logger.warning(
            "the rollout server lost the policy's weights, or had not taken them all, and has them again; rollouts "
            "queued or under way may be of others and are dropped"
        )
        self._count_versions(self.args.max_staleness + 1)

    def _count_versions(self, count: int) -> None:
        self.model_version += count
        if self.rollout_worker:
            self.rollout_worker.update_model_version(self.model_version)

    def _sync_weight_merged(self, t0: float) -> tuple[float, float, float]:
        """TRL's, without its merge: that would write the base weights, and round them, at every sync.

        Returns the times of TRL's phases: nothing is paused, all processes arrive, everything is sent.
        """
        self.accelerator.wait_for_everyone()
        arrived = time.time()
        self.transfer.send_weights()
        sent = time.time()
        for name, value in self.transfer.reports[-1].metrics().items():
            self._metrics["train"][name].append(value)
        if self.accelerator.is_main_process:
            self._count_versions(1)
        return t0, arrived, sent


def refuse_token() -> None:
    if os.environ.get(TOKEN_VARIABLE):
        raise ValueError(
            f"{TOKEN_VARIABLE} is set, but TRL's asynchronous rollout worker sends no token and would be turned away: "
            "serve on 127.0.0.1 (or a network of your own) without one and unset it, or use FuraGRPOTrainer"
        )


def check_layout() -> None:
    """Raises RuntimeError where this TRL lacks a private name that this file relies on."""
    import inspect

    import trl

    source = inspect.getsource(inspect.getmodule(AsyncGRPOTrainer))
    if missing := [name for name in PRIVATE_NAMES if name not in source]:
        raise RuntimeError(
            f"TRL {trl.__version__}: AsyncGRPO lacks {', '.join(missing)}. fura_rl reads TRL "
            f"{TRL_VERSIONS_READ}: install that version, or bring fura_rl/async_grpo.py up to the new layout"
        )
