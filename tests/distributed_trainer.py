"""One process of a two-process trainer, run by test_distributed.py under `accelerate launch`.

    distributed_trainer.py CASE,CASE... MODEL SERVER_URL[,SERVER_URL...] FOLDER

Trains each case for a few steps, syncs to the server after each step, and writes what there is to compare, as
FOLDER/CASE-PROCESS.pt: probe gaps, the payload as it was sent, trained tensors, which base parameters were gathered.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from conftest import perturb_trained
from deepspeed_on_cpu import allow_deepspeed_on_cpu, asked_for_deepspeed
from fsdp2_on_cpu import allow_fsdp_on_cpu
from peft import get_peft_model
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from trl import ModelConfig

from fura_rl.adapters.registry import peft_config_for
from fura_rl.rollout_client import RolloutClient
from fura_rl.sync import message
from fura_rl.sync.engine import Push, Update
from fura_rl.sync.factors import Factors
from fura_rl.sync.http_transport import HttpTransport
from fura_rl.sync.probe import StaleEngineError
from fura_rl.sync.remote_engine import Follower, RemoteEngine
from fura_rl.sync.sharding import PeerFailedError, is_piece, local, whole
from fura_rl.sync.weight_sync import SyncReport, WeightSync

TOKENS = [3 + 5 * i % 40 for i in range(40)]


CASES = {
    "fura": ("fura", None),
    "fura-rows": ("fura", {"block_axis": "out"}),
    "fura-core": ("fura", {"form": "core"}),
    "lora": ("lora", None),
    "dora": ("dora", None),
    "oft": ("oft", {"oft_block_size": 16, "r": 0}),
    "full": ("full", None),
}
# of a mixture of experts
STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
EXPERT_CASES = {
    "experts": ("lora", {"lora_dropout": 0.0, "target_modules": ["q_proj"], "target_parameters": STACKS}),
    "full-experts": ("full", None),
}
# Where a last sync leaves rows of a module's weights as they were: the module, and which part of its rows, the last,
# they are.
LEFT_BEHIND = {
    "full": ("layers.0.self_attn.q_proj", 2),
    "experts": ("layers.1.mlp.experts", 8),
    "full-experts": ("layers.1.mlp.experts", 8),
}


def even_letters(completions: list[Any], **_: Any) -> list[float]:
    """A reward that differs within a group of an untrained model's rollouts, for test_distributed.py."""
    return [sum(ord(letter) % 2 == 0 for letter in str(completion)) / 10 for completion in completions]


@contextmanager
def gathers_of(parameters: list[torch.Tensor]) -> Iterator[list[tuple[int, ...]]]:
    """Collects the shapes of those of the sharded `parameters` that `full_tensor` is called on meanwhile."""
    places = {local(p).data_ptr() for p in parameters if is_piece(p)}
    gathered: list[tuple[int, ...]] = []
    original = DTensor.full_tensor

    def noted(self, *args, **kwargs):
        if self.to_local().data_ptr() in places:
            gathered.append(tuple(self.shape))
        return original(self, *args, **kwargs)

    DTensor.full_tensor = noted
    try:
        yield gathered
    finally:
        DTensor.full_tensor = original


def policy_of(case: str, model: str) -> torch.nn.Module:
    """A case on the checkpoint `model`, away from its start, where LoRA's factors hide each other's gradient."""
    adapter, options = (CASES | EXPERT_CASES)[case]
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config = peft_config_for(adapter, ModelConfig(), None, options)
    policy = base if config is None else get_peft_model(base, config)
    perturb_trained(policy, 0.02 if config is None else 0.3, seed=0)
    return policy


def train_and_sync(accelerator: Accelerator, case: str, model: str, url: str) -> dict[str, Any]:
    policy = policy_of(case, model)
    engine = RemoteEngine(HttpTransport(url)) if accelerator.is_main_process else Follower(torch.float32)
    sync = WeightSync(policy, engine, TOKENS, probe_every=1)
    base = [p for p in policy.parameters() if not p.requires_grad]
    with gathers_of(base) as gathered:
        reports = three_steps(accelerator, policy, sync)
    result = {
        "kind": accelerator.distributed_type.value,
        "processes": accelerator.num_processes,
        "pieces": sum(is_piece(p) for p in policy.parameters()),
        "gathered": gathered,
        "gaps": [report.probe_max_gap for report in reports],
        "gains": [report.audit_gain_min for report in reports],
        "trained": {name: whole(p).clone() for name, p in policy.named_parameters() if p.requires_grad},
    }
    if accelerator.is_main_process:
        result |= served(sync)
    if case in LEFT_BEHIND:
        result["stale"] = error_of_rows_that_did_not_arrive(accelerator, policy, sync, *LEFT_BEHIND[case])
    result["non-finite"] = error_of_a_nan_in_the_last_process(accelerator, policy, sync)
    if accelerator.is_main_process:
        engine.close()
    return result


def three_steps(accelerator: Accelerator, policy: torch.nn.Module, sync: WeightSync) -> list[SyncReport]:
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=1e-2)
    wrapped, optimizer = accelerator.prepare(policy, optimizer)
    reports = []
    for step in range(3):
        seed = torch.Generator().manual_seed(step + 10 * accelerator.process_index)
        tokens = torch.randint(3, 40, (2, 16), generator=seed)
        accelerator.backward(wrapped(input_ids=tokens, labels=tokens).loss)
        optimizer.step()
        optimizer.zero_grad()
        reports.append(sync.sync())
    return reports


def train_and_sync_replicas(accelerator: Accelerator, case: str, model: str, urls: str) -> dict[str, Any]:
    """Several servers; whole weights are here what is too large to be kept from the first of them to the second."""
    if case == "full":
        message.KEPT_BYTES = 0
    policy = policy_of(case, model)
    engine = RolloutClient(urls, 120.0).engine if accelerator.is_main_process else Follower(torch.float32)
    reports = three_steps(accelerator, policy, WeightSync(policy, engine, TOKENS, probe_every=1))
    result = {
        "gaps": [report.probe_max_gap for report in reports],
        "gains": [report.audit_gain_min for report in reports],
    }
    if accelerator.is_main_process:
        result["status"] = [replica.transport.call("fura_status")[0] for replica in engine.engines]
        result["logprobs"] = [replica.prompt_logprobs(TOKENS) for replica in engine.engines]
        engine.close()
    return result


def served(sync: WeightSync) -> dict[str, Any]:
    """What was sent last, and what the engine makes of it."""
    spans = {name: [(0, weight.shape[0])] for name, weight in sync.weights.items() if len(weight.shape) == 2}
    return {
        "payload": [chunk.data for chunk in sync.engine._last.kept],
        "logprobs": sync.engine.prompt_logprobs(TOKENS),
        "replies": {name: reply.output for name, reply in sync.engine.kernel_replies(spans)[0].items()},
    }


@torch.no_grad()
def error_of_rows_that_did_not_arrive(
    accelerator: Accelerator, policy: torch.nn.Module, sync: WeightSync, ending: str, part: int
) -> str:
    """One more sync, in which rows of a module's weights stay as they were: some of process 1's where it holds its own,
    else all."""
    left = {name: weight for name, weight in sync.weights.items() if weight.module_name.endswith(ending)}
    before = {
        name: {key: tensor.clone() for key, tensor in weight.factors().tensors.items()} for name, weight in left.items()
    }
    sharded = any(is_piece(weight.parameter) for weight in left.values())
    for parameter in policy.parameters():
        if parameter.requires_grad:
            local(parameter).mul_(1.01)
    push = sync.engine.push

    def push_the_rest(update: Update) -> Push:
        factors = dict(update.factors)
        for name, old in before.items():
            tensors = {key: tensor.clone() for key, tensor in factors[name].tensors.items()}
            for key, tensor in tensors.items():
                first = len(tensor) - len(tensor) // part if sharded else 0
                tensor[first:] = old[key][first:]
            factors[name] = Factors(factors[name].rule, tensors)
        return push(replace(update, factors=factors))

    if accelerator.is_main_process:
        sync.engine.push = push_the_rest
    sync.probe_every = 10**9  # by the audit alone
    try:
        sync.sync()
    except (StaleEngineError, PeerFailedError) as error:
        return f"{type(error).__name__}: {error}"
    return "none"


@torch.no_grad()
def error_of_a_nan_in_the_last_process(accelerator: Accelerator, policy: torch.nn.Module, sync: WeightSync) -> str:
    if accelerator.is_last_process:
        local(next(p for p in policy.parameters() if p.requires_grad)).fill_(float("nan"))
    try:
        sync.sync()
    except (FloatingPointError, PeerFailedError) as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def main(cases: str, model: str, url: str, folder: str) -> None:
    if asked_for_deepspeed():
        allow_deepspeed_on_cpu()
        accelerator = Accelerator()
        accelerator.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 2
    else:
        allow_fsdp_on_cpu()
        accelerator = Accelerator(cpu=True)
    for case in cases.split(","):
        result = (train_and_sync_replicas if "," in url else train_and_sync)(accelerator, case, model, url)
        torch.save(result, Path(folder) / f"{case}-{accelerator.process_index}.pt")
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
