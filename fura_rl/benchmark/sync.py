"""One in-process sync into a live vLLM engine, against TRL's stock way: merge, push every weight, unmerge."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from fura_rl.adapters.fura_config import FuraConfig
from fura_rl.adapters.fura_tuner import PAPER_TARGETS
from fura_rl.benchmark import measure
from fura_rl.benchmark.measure import Settings
from fura_rl.benchmark.models import random_model


class SkippedError(RuntimeError):
    """This machine lacks what the benchmark needs."""


def run(settings: Settings) -> list[dict[str, Any]]:
    """Raises SkippedError where vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise SkippedError("vllm is not installed")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from transformers import AutoModelForCausalLM
    from vllm import LLM

    from fura_rl.sync.fold import checkpoint_weights
    from fura_rl.sync.vllm_engine import InProcessEngine, cpu_cache_settings
    from fura_rl.sync.weight_sync import WeightSync

    with tempfile.TemporaryDirectory() as folder:
        random_model(settings.model, settings.device, settings.dtype).save_pretrained(folder)
        on_cpu = settings.device.type == "cpu"
        llm = LLM(
            folder, dtype=str(settings.dtype).removeprefix("torch."), skip_tokenizer_init=True, max_model_len=256,
            enforce_eager=True, gpu_memory_utilization=0.25, disable_log_stats=True,
            **(cpu_cache_settings(0.05) if on_cpu else {}),
        )  # fmt: skip
        rows = []
        for method, config in (
            ("fura", FuraConfig(target_modules=PAPER_TARGETS)),
            ("lora", LoraConfig(target_modules=PAPER_TARGETS, r=32, lora_alpha=32)),
        ):
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=settings.dtype).to(settings.device)
            policy = get_peft_model(model, config)
            engine = InProcessEngine(llm)
            sync = WeightSync(policy, engine, list(range(3, 35)))
            report = sync.sync()

            def stock(policy: Any = policy, engine: InProcessEngine = engine) -> None:
                """TRL's order of work through our loader: its own, tensor by tensor, does not run on a CPU engine."""
                policy.merge_adapter()
                engine.load((w.name, w.parameter.data) for w in checkpoint_weights(policy))
                policy.unmerge_adapter()

            calls = {"sync": sync.sync, "stock": stock}
            times = measure.interleaved_medians(calls, settings)
            rows.append(
                {
                    "model": settings.model,
                    "method": method,
                    "sync_s": times["sync"],
                    "stock_s": times["stock"],
                    "sync_ratio": times["sync"] / times["stock"],
                    **{f"{phase}_s": seconds for phase, seconds in sync.sync().phases.items()},
                    "payload_mb": report.payload_bytes / 1e6,
                    "dense_mb": report.dense_bytes / 1e6,
                    "probe_max_gap": report.probe_max_gap,
                }
            )
            del policy, model, sync
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return rows
