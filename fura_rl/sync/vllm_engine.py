"""The in-process vLLM engine as a receiver of weights.  The only module that touches vLLM's insides.

Read in vLLM 0.31.0 (CPU and CUDA sources).  `check_engine` looks for every private name used here when the engine is
taken over, so that an upgrade that moves one ends with a message and not with stale weights.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vllm import LLM

VLLM_VERSIONS_READ = "0.31"


class InProcessEngine:
    """A running `vllm.LLM` of this process."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self._model_runner = find_model_runner(llm)

    @property
    def dtype(self) -> torch.dtype:
        return self.llm.llm_engine.model_config.dtype

    @property
    def fused_modules(self) -> dict[str, list[str]]:
        """vLLM's fused linear layers and the checkpoint modules they are made of, e.g. qkv_proj: q_, k_, v_proj."""
        return getattr(self._model_runner.get_model(), "packed_modules_mapping", {})

    def load(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Load checkpoint tensors into the live model and drop every cached key and value.

        A fused module must arrive whole: vLLM rebuilds it from uninitialised memory.  `load_weights` per tensor is not
        used because CPU linear weights live only inside a prepacked kernel.
        """
        with quiet_partial_reload():
            self._model_runner.reload_weights(weights_iterator=weights)
        self._repack_tied_output_head()
        self.llm.reset_prefix_cache()

    def _repack_tied_output_head(self) -> None:
        """Rebuild the output head's kernel where it shares the embedding's tensor.

        A reload processes a tied tensor for one of its two owners only (limitation 2 in vLLM's
        `model_loader/reload/__init__.py`), so on CPU the head's prepacked copy would stay stale by 2-3 nats.
        """
        model = self._model_runner.get_model()
        head = getattr(model, "lm_head", None)
        embedding = getattr(getattr(model, "model", None), "embed_tokens", None)
        quant_method = getattr(head, "quant_method", None)
        if embedding is None or quant_method is None:
            return
        if head is embedding or getattr(head, "weight", None) is getattr(embedding, "weight", None):
            quant_method.process_weights_after_loading(head)

    @torch.no_grad()
    def kernel_output(self, module_name: str, x: torch.Tensor) -> torch.Tensor | None:
        """x W^T (rows, out) of a live linear layer, bias left out, or None where the engine has no such linear layer.

        Goes through the layer's own kernel, the only place where a CPU engine keeps the weight.
        """
        from vllm.model_executor.layers.linear import LinearBase

        model = self._model_runner.get_model()
        try:
            module = model.get_submodule(module_name)
        except AttributeError:
            return None
        if not isinstance(module, LinearBase):
            return None
        return module.quant_method.apply(module, x.to(self._model_runner.device, self.dtype), None)

    def prompt_logprobs(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Log-probabilities (len(token_ids) - 1,) of each token given those before it, in nats, at temperature 1."""
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=1, temperature=1.0, prompt_logprobs=0, detokenize=False)
        [output] = self.llm.generate([{"prompt_token_ids": list(token_ids)}], params, use_tqdm=False)
        entries = zip(output.prompt_logprobs[1:], token_ids[1:], strict=True)
        return torch.tensor([entry[token].logprob if entry else math.nan for entry, token in entries])


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
    missing = [name for name in ("reload_weights", "get_model") if not hasattr(owner, name)]
    if missing:
        raise RuntimeError(
            f"vLLM {vllm.__version__} does not offer llm_engine.model_executor.driver_worker.model_runner with "
            f"{' and '.join(missing)} in this process. fura_rl reads vLLM {VLLM_VERSIONS_READ}: install that version, "
            "set VLLM_ENABLE_V1_MULTIPROCESSING=0 for an engine made by hand, or bring fura_rl/sync/vllm_engine.py up "
            "to the new layout"
        )
    return owner


@contextlib.contextmanager
def quiet_partial_reload() -> Iterator[None]:
    """Silence vLLM's warnings about weights that a reload did not bring: a sync brings what changed, on purpose."""
    loggers = [
        logging.getLogger(name)
        for name in ("vllm.model_executor.model_loader.reload.layerwise", "vllm.v1.worker.gpu_model_runner")
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
