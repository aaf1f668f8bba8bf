"""The weight-transfer backend "factored" and the worker extension beside it: vLLM's own life cycle, our receiver.

The backend follows init / start / update / finish and raises what goes wrong; its last update commits, so that finish
cannot fail.  The extension does the same through calls that reply instead of raising, since an exception in one of
several tensor-parallel workers leaves vLLM's own sessions in different states, and adds what the life cycle has no
room for: status, lease, audit.  Read in vLLM 0.31.  Imported in workers only.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from fura_rl.sync.base_weights import BaseWeights
from fura_rl.sync.payload_source import read_payload
from fura_rl.sync.receiver import Receiver
from fura_rl.sync.vllm_model import LiveModel
from fura_rl.sync.vllm_replies import kernel_replies


@dataclass
class FactoredInitInfo(WeightTransferInitInfo):
    """Who claims the engine, and for what policy: tensors by name and shape, which of them are stacks of experts that
    the checkpoint holds one by one, and samples of the base weights."""

    owner: str
    tensors: dict[str, list[int]]
    stacks: dict[str, list[str]] = field(default_factory=dict)
    base_samples: dict[str, list[Any]] = field(default_factory=dict)
    lease_seconds: float = 30.0


@dataclass
class FactoredUpdateInfo(WeightTransferUpdateInfo):
    """One chunk to stage (`source`), or with `commit` the version to fold in, of `chunk_count` chunks."""

    owner: str
    version: int
    previous: int | None = 0
    index: int = 0
    checksum: int = 0
    source: dict[str, str] | None = None
    commit: bool = False
    chunk_count: int = 0
    rounding_seed: int | None = None


class FactoredWeightTransferEngine(WeightTransferEngine[FactoredInitInfo, FactoredUpdateInfo]):
    """Folds small factors into this worker's weights, from the checkpoint that the engine was started with."""

    init_info_cls = FactoredInitInfo
    update_info_cls = FactoredUpdateInfo
    supports_draft_weight_update = False

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: torch.nn.Module) -> None:
        super().__init__(config, vllm_config, device, model)
        model_config = vllm_config.model_config
        self.live = LiveModel(model, device, model_config.dtype, lambda: set_current_vllm_config(vllm_config))
        self.receiver = Receiver(self.live, BaseWeights(model_config.model, model_config.revision, device))

    def init_transfer_engine(self, init_info: FactoredInitInfo) -> None:
        tensors = {name: tuple(shape) for name, shape in init_info.tensors.items()}
        self.receiver.claim(init_info.owner, init_info.lease_seconds, tensors, init_info.stacks, init_info.base_samples)

    def start_weight_update(self) -> None:
        """Nothing to do: staging touches no live weight."""

    def receive_weights(self, update_info: FactoredUpdateInfo) -> None:
        info = update_info
        if info.commit:
            self.receiver.commit(info.owner, info.version, info.chunk_count, info.rounding_seed)
        else:
            data = read_payload(info.source or {})
            self.receiver.stage(info.owner, info.version, info.previous, info.index, data, info.checksum)

    def finish_weight_update(self) -> None:
        """Nothing to do: the last update has committed."""

    def shutdown(self) -> None:
        """Nothing to close."""


class FactoredSyncExtension:
    """Methods that vLLM adds to its worker class; every reply is a dict, which the HTTP route passes on as JSON."""

    def fura_claim(self, info: dict[str, Any]) -> dict[str, Any]:
        engine = self.weight_transfer_engine
        return self._fura_reply(lambda: engine.init_transfer_engine(engine.parse_init_info(info)))

    def fura_update(self, info: dict[str, Any]) -> dict[str, Any]:
        engine = self.weight_transfer_engine
        with set_current_vllm_config(self.vllm_config):
            return self._fura_reply(lambda: engine.update_weights(info))

    def fura_status(self) -> dict[str, Any]:
        return self._fura_reply(lambda: None)

    def fura_renew(self, owner: str) -> dict[str, Any]:
        return self._fura_reply(lambda: self.weight_transfer_engine.receiver.renew(owner))

    def fura_release(self, owner: str) -> dict[str, Any]:
        return self._fura_reply(lambda: self.weight_transfer_engine.receiver.release(owner))

    def fura_poison(self, reason: str) -> dict[str, Any]:
        """Make this worker refuse to generate: another worker of the engine holds another version."""
        self.weight_transfer_engine.live.poisoned = reason
        return self.fura_status()

    def fura_replies(self, spans: dict[str, list[list[int]]]) -> dict[str, Any]:
        """The audit's replies: name -> [output, covered, eps], tensors as float32 in base64."""
        replies = kernel_replies(self.weight_transfer_engine.live, spans)
        return {name: [pack(reply.output), pack(reply.covered), reply.eps] for name, reply in replies.items()}

    def _fura_reply(self, call: Callable[[], None]) -> dict[str, Any]:
        """The status after `call`; "error" and its kind where it failed, with no live weight changed."""
        try:
            call()
        except Exception as error:
            failure = {"error": f"{error}", "kind": type(error).__name__}
        else:
            failure = {"error": None}
        return self.weight_transfer_engine.receiver.status() | failure


def pack(tensor: torch.Tensor) -> str:
    return base64.b64encode(tensor.float().cpu().numpy().tobytes()).decode()
