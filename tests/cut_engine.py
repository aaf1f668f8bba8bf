"""One of two processes that cut one engine up between them, run by test_distributed.py under `accelerate launch`.

    cut_engine.py MODEL FOLDER

For each method two updates, probed and audited; then a sync in which the second process alone does not write its part
of a module.  Writes FOLDER/PROCESS.json: the gain of each method, and what the last sync ended with.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import check_that_two_updates_arrive, perturb_trained, start_llm
from peft import get_peft_model
from test_weight_sync import leave_out
from transformers import AutoModelForCausalLM
from trl import ModelConfig

from fura_rl.adapters.registry import peft_config_for
from fura_rl.sync.engine import RolloutEngine
from fura_rl.sync.probe import StaleEngineError
from fura_rl.sync.sharding import PeerFailedError
from fura_rl.sync.vllm_engine import InProcessEngine
from fura_rl.sync.weight_sync import WeightSync

TOKENS = list(range(5, 45))
METHODS = ["fura", "svd", "lora", "dora", "oft", "miss", "full"]
LEFT_BEHIND = "model.layers.1.self_attn.o_proj"


def sync_of(method: str, model: str, engine: RolloutEngine) -> WeightSync:
    torch.manual_seed(0)
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config = peft_config_for(method, ModelConfig(), None, None)
    return WeightSync(policy if config is None else get_peft_model(policy, config), engine, TOKENS, probe_every=1)


def error_of_a_part_that_is_not_written(sync: WeightSync, process: int) -> str:
    leave_out(sync, pytest.MonkeyPatch(), lambda module: process == 1 and module == LEFT_BEHIND)
    sync.probe_every = 10**9  # by the audit alone
    perturb_trained(sync.model, 0.2, seed=9)
    try:
        sync.sync()
    except (StaleEngineError, PeerFailedError) as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def main(model: str, folder: str) -> None:
    torch.distributed.init_process_group("gloo")
    process = torch.distributed.get_rank()
    engine = InProcessEngine(
        start_llm(Path(model), tensor_parallel_size=2, distributed_executor_backend="external_launcher", seed=0)
    )
    seen: dict[str, Any] = {}
    for method in METHODS:
        reports = check_that_two_updates_arrive(sync_of(method, model, engine), 0.2, everything=True)
        seen[method] = reports[-1].audit_gain_min
    sync = sync_of("fura", model, engine)
    check_that_two_updates_arrive(sync, 0.2, everything=True)
    seen["left behind"] = error_of_a_part_that_is_not_written(sync, process)
    (Path(folder) / f"{process}.json").write_text(json.dumps(seen))
    engine.llm.llm_engine.engine_core.shutdown()  # and with it the process group


if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    main(*sys.argv[1:])
