"""The in-process vLLM engine as a receiver of weights, and one in a process of its own.

Read in vLLM 0.31.0 (CPU and CUDA sources).  `find_model_runner` looks for every private name used here when the engine
is taken over, so that an upgrade that moves one ends with a message and not with stale weights.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from fura_rl.randomness import drawing_from
from fura_rl.sync.audit import KernelReply
from fura_rl.sync.engine import Push, Update, rounding_generator
from fura_rl.sync.factors import Span
from fura_rl.sync.fingerprint import Sample
from fura_rl.sync.stacks import Stacks
from fura_rl.sync.vllm_model import LiveModel
from fura_rl.sync.vllm_plugin import BACKEND, EXTENSION
from fura_rl.sync.vllm_private import VLLM_VERSIONS_READ
from fura_rl.sync.vllm_replies import kernel_replies

if TYPE_CHECKING:
    from vllm import LLM

# oneDNN keeps a compiled product for every number of tokens that was ever multiplied, up to 1,024: in rollouts on a CPU
# the process would grow by 0.4 GB over 1,700 steps of the quickstart.  256 are full in 20 steps and cost 7% of rollout
# and sync.  Read by oneDNN at its first product.
ENVIRONMENT = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256"}
# vLLM's attention in float32 on a GPU is a Triton kernel, and Triton multiplies float32 in TF32 unless told otherwise:
# log-probs of the quickstart were off by 8e-3 nats, which the proof of a float32 sync takes for a stale weight.  Part
# of the key of Triton's cache, and read when a kernel is compiled.
FLOAT32_ENVIRONMENT = {"TRITON_F32_DEFAULT": "ieee"}


def engine_environment(dtype: str) -> dict[str, str]:
    """What an engine that serves in `dtype` needs of its environment before it starts; a variable that is set wins."""
    return ENVIRONMENT | (FLOAT32_ENVIRONMENT if dtype in ("float32", "float") else {})


class InProcessEngine:
    """A running `vllm.LLM` of this process: folds straight into its live weights, from the trainer's base weights."""

    reads_the_trainers_base = True

    def __init__(self, llm: LLM) -> None:
        from vllm.config import set_current_vllm_config

        self.llm = llm
        self.version = 0
        runner = find_model_runner(llm)
        self.model = LiveModel(
            runner.get_model(), runner.device, self.dtype, lambda: set_current_vllm_config(runner.vllm_config)
        )

    @property
    def dtype(self) -> torch.dtype:
        return self.llm.llm_engine.model_config.dtype

    def prepare(
        self, tensors: Mapping[str, tuple[int, ...]], stacks: Stacks, base_samples: Mapping[str, Sample]
    ) -> None:
        """`base_samples` are not looked at: the engine folds from the trainer's own base."""
        self.model.record(tensors, stacks)

    def resend(self) -> None:
        """Write the last update once more."""
        self.push(self._last)

    def push(self, update: Update) -> Push:
        """Fold into the live weights and drop every cached key and value.

        The engine's own base, where it differs from the trainer's (another checkpoint), is overwritten in the modules
        that `update` touches.
        """
        started = time.perf_counter()
        self._last = update

        def generator(name: str) -> torch.Generator | None:
            return rounding_generator(update.rounding_seed, name, self.model.device)

        self.model.write(update.factors, update.read, generator)
        self.llm.reset_prefix_cache()
        self.version = update.version
        written = sum(
            region.element_count * self.dtype.itemsize
            for module in {module for name in update.factors for module in self.model.owners[name]}
            for region in self.model.regions[module]
        )
        return Push(written, {"fold": time.perf_counter() - started})

    def kernel_replies(self, spans: Mapping[str, Sequence[Span]]) -> list[dict[str, KernelReply]]:
        return [kernel_replies(self.model, spans)]

    def prompt_logprobs(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Leaves no trace: neither in the generators of this process nor in the engine's cache."""
        with drawing_from(0):
            logprobs = prompt_logprobs(self.llm, token_ids)
        self.llm.reset_prefix_cache()
        return logprobs


def cpu_cache_settings(memory_utilization: float) -> dict[str, int]:
    """The key-value cache of a CPU engine as `LLM` arguments: this share of the machine's memory, at most 4 GiB.

    Given outright because vLLM's CPU worker subtracts what the whole process holds, the trainer included, from its
    share, and finds nothing left on a small machine.  VLLM_CPU_KVCACHE_SPACE (in GiB), where set, wins.
    """
    import psutil

    if "VLLM_CPU_KVCACHE_SPACE" in os.environ:
        return {}
    return {"kv_cache_memory_bytes": min(int(memory_utilization * psutil.virtual_memory().total), 4 * 2**30)}


def find_model_runner(llm: LLM) -> object:
    """The object that owns the live weights.

    Raises:
        RuntimeError: where this vLLM is laid out otherwise than the version read, or the engine is not in process.
    """
    import vllm

    owner = llm
    for name in ("llm_engine", "model_executor", "driver_worker", "model_runner"):
        owner = getattr(owner, name, None)
        if owner is None:
            break
    missing = [name for name in ("get_model", "vllm_config", "device") if not hasattr(owner, name)]
    if missing:
        raise RuntimeError(
            f"vLLM {vllm.__version__} does not offer llm_engine.model_executor.driver_worker.model_runner with "
            f"{' and '.join(missing)} in this process. fura_rl reads vLLM {VLLM_VERSIONS_READ}: install that version, "
            "set VLLM_ENABLE_V1_MULTIPROCESSING=0 for an engine made by hand, or bring fura_rl/sync/vllm_engine.py up "
            "to the new layout"
        )
    return owner


class ProcessTransport:
    """A `vllm.LLM` whose engine runs in processes of its own (vLLM's default), reached through vLLM's calls."""

    lease_seconds = float("inf")  # the engine ends with this process
    timeout = 0.0  # an engine process that died does not come back
    payload_transport = "file"
    address = "the engine process"

    def __init__(self, llm: LLM) -> None:
        self.llm = llm

    @property
    def dtype(self) -> torch.dtype:
        return self.llm.llm_engine.model_config.dtype

    def call(self, method: str, **arguments: Any) -> list[dict[str, Any]]:
        return self.llm.collective_rpc(method, kwargs=arguments)

    def pause(self) -> None:
        """Nothing runs: `LLM.generate` returns when its requests have ended."""

    def resume(self) -> None:
        self.llm.reset_prefix_cache()

    def wait_until_up(self, timeout: float) -> None:
        """It is up, or this process has seen it die."""

    def stamp(self, version: int) -> None:
        self.llm.update_weight_version(str(version))

    def prompt_logprobs(self, token_ids: Sequence[int]) -> torch.Tensor:
        return prompt_logprobs(self.llm, token_ids)


def factored_sync_settings() -> dict[str, Any]:
    """What a `vllm.LLM` in another process needs as arguments to be synced."""
    return {"weight_transfer_config": {"backend": BACKEND}, "worker_extension_cls": EXTENSION}


def prompt_logprobs(llm: LLM, token_ids: Sequence[int]) -> torch.Tensor:
    """Log-probabilities (len(token_ids) - 1,) of each token given those before it, in nats, at temperature 1."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=1, temperature=1.0, prompt_logprobs=0, detokenize=False)
    [output] = llm.generate([{"prompt_token_ids": list(token_ids)}], params, use_tqdm=False)
    entries = zip(output.prompt_logprobs[1:], token_ids[1:], strict=True)
    return torch.tensor([entry[token].logprob if entry else math.nan for entry, token in entries])
