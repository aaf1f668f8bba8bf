"""What the sync benchmark syncs into: an engine of this process, a rollout server, and TRL's stock way of loading."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import AutoTokenizer

from fura_rl.benchmark.measure import Settings
from fura_rl.benchmark.models import random_model
from fura_rl.quickstart import BASE_MODEL
from fura_rl.serve import die_with_parent, free_port
from fura_rl.sync.fold import checkpoint_weights

if TYPE_CHECKING:
    from peft import PeftModel
    from vllm import LLM

    from fura_rl.sync.http_transport import HttpTransport
    from fura_rl.sync.vllm_engine import InProcessEngine

LAUNCHER = Path(__file__).resolve().parents[2] / "launch" / "serve_rollouts.py"
MAX_LENGTH = 256
START_SECONDS = 900.0
ENVIRONMENT = dict(os.environ)  # as it was before an engine of this process wrote its own ports and ranks into it
PHASES = ("merge", "push", "unmerge")  # of the stock way


def make_checkpoint(settings: Settings, size: str, checkpoint: Path) -> None:
    """A random model of `size` with the embedded tokenizer, which a server wants to see."""
    random_model(size, settings.device, settings.dtype).save_pretrained(checkpoint)
    AutoTokenizer.from_pretrained(BASE_MODEL).save_pretrained(checkpoint)


def start_in_process(settings: Settings, checkpoint: Path) -> LLM:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM

    from fura_rl.sync.vllm_engine import cpu_cache_settings

    return LLM(
        str(checkpoint), dtype=dtype_name(settings.dtype), max_model_len=MAX_LENGTH, enforce_eager=True,
        gpu_memory_utilization=0.25, disable_log_stats=True,
        **(cpu_cache_settings(0.01) if settings.device.type == "cpu" else {}),
    )  # fmt: skip


@contextmanager
def rollout_server(settings: Settings, checkpoint: Path) -> Iterator[HttpTransport]:
    """A server on a port of its own for the time of the context.

    Raises:
        RuntimeError: where it ends before it is up.
    """
    from fura_rl.sync.http_transport import HttpTransport

    port = free_port()
    command = [
        *(sys.executable, str(LAUNCHER), "--model", str(checkpoint), "--port", str(port), "--restarts", "0"),
        *("--dtype", dtype_name(settings.dtype), "--max-model-len", str(MAX_LENGTH), "--enforce-eager"),
        *("--gpu-memory-utilization", "0.25"),
    ]
    log = checkpoint / "server.log"
    with log.open("w") as output:
        environment = ENVIRONMENT | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
        server = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, preexec_fn=die_with_parent
        )
    try:
        transport = HttpTransport(f"http://127.0.0.1:{port}", timeout=600.0)
        deadline = time.monotonic() + START_SECONDS
        while not is_up(transport):
            if server.poll() is not None or time.monotonic() > deadline:
                tail = "\n".join(log.read_text().splitlines()[-60:])
                raise RuntimeError(f"the rollout server did not start (exit code {server.poll()}):\n{tail}")
            time.sleep(1.0)
        yield transport
    finally:
        server.terminate()
        server.wait(timeout=60)


def is_up(transport: HttpTransport) -> bool:
    from fura_rl.sync.transport import EngineLostError, RemoteSyncError

    try:
        transport.request("GET", "/health", timeout=2.0)
    except (EngineLostError, RemoteSyncError):
        return False
    return True


def stock_sync(policy: PeftModel, engine: InProcessEngine) -> dict[str, float]:
    """TRL's order of work: merge into the live model, push every weight, subtract again.  Seconds by phase.

    On a GPU tensor by tensor through `load_weights`, as TRL 1.16 does.  A CPU engine of vLLM 0.31 keeps its linear
    weights inside a packed kernel, where `load_weights` fails, so there the weights go through vLLM's own reload; a
    tied output head, which that leaves stale (limitation 2 in `model_loader/reload/__init__.py`), is packed again.
    """
    from fura_rl.sync.vllm_engine import find_model_runner

    runner = find_model_runner(engine.llm)
    clock = [time.perf_counter()]
    policy.merge_adapter()
    clock.append(time.perf_counter())
    weights = [(weight.name, weight.parameter.data) for weight in checkpoint_weights(policy)]
    if runner.device.type == "cpu":
        runner.reload_weights(weights_iterator=iter(weights))
        pack_tied_head(runner.get_model())
    else:
        for named in weights:
            runner.get_model().load_weights([named])
    engine.llm.reset_prefix_cache()
    clock.append(time.perf_counter())
    policy.unmerge_adapter()
    clock.append(time.perf_counter())
    return {name: after - before for name, (before, after) in zip(PHASES, itertools.pairwise(clock), strict=True)}


def pack_tied_head(model: torch.nn.Module) -> None:
    head, embedding = getattr(model, "lm_head", None), model.model.embed_tokens
    if head is embedding or getattr(head, "weight", None) is embedding.weight:
        head.quant_method.process_weights_after_loading(head)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
