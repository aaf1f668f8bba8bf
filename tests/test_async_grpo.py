"""TRL's AsyncGRPO with a real rollout server and TRL's own rollout worker: every adapter, base weights untouched."""

import os
import queue
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import PartialState
from conftest import PARITY_NATS, REPOSITORY, perturb_trained
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer
from trl.chat_template_utils import qwen3_template
from trl.experimental.async_grpo import AsyncGRPOConfig, async_grpo_trainer, packing
from trl.experimental.async_grpo.async_rollout_worker import RolloutSample
from trl.experimental.async_grpo.weight_transfer import WeightTransferClient

from fura_rl import FuraConfig
from fura_rl.async_grpo import (
    FactoredWeightTransfer,
    FuraAsyncGRPOTrainer,
    RestartableEngine,
    VouchedQueue,
    check_layout,
)
from fura_rl.sync.engine import Update
from fura_rl.sync.factors import Factors

PEFT_CONFIGS = {
    "fura": FuraConfig(target_modules="all-linear"),
    "lora": LoraConfig(target_modules="all-linear", r=8, init_lora_weights=False),
    "full": None,
}


class TorchFlashAttention:
    """`flash_attn_varlen_func` in plain torch: TRL's tree attention takes it from a CUDA-only kernel."""

    @staticmethod
    def flash_attn_varlen_func(q, k, v, ends_q, ends_k, max_q, max_k, *, softmax_scale, causal, window_size):
        assert causal
        assert window_size == (-1, -1)
        groups = q.shape[1] // k.shape[1]
        parts = []
        for i in range(len(ends_q) - 1):
            queries, keys, values = (
                t[ends[i] : ends[i + 1]].transpose(0, 1) for t, ends in ((q, ends_q), (k, ends_k), (v, ends_k))
            )
            keys, values = keys.repeat_interleave(groups, 0), values.repeat_interleave(groups, 0)
            seen = torch.ones(queries.shape[1], keys.shape[1], dtype=torch.bool).tril(keys.shape[1] - queries.shape[1])
            part = torch.nn.functional.scaled_dot_product_attention(
                queries, keys, values, attn_mask=seen, scale=softmax_scale
            )
            parts.append(part.transpose(0, 1))
        return torch.cat(parts)


def count_of_even_characters(completions, **kwargs):
    """A reward that differs within a group; at module level, since the worker's process unpickles it."""
    return [sum(ord(letter) % 2 == 0 for letter in completion[0]["content"]) / 10 for completion in completions]


def test_the_transfer_has_trls_protocol_and_trl_has_what_is_read_of_it():
    wanted = {name for name in vars(WeightTransferClient) if not name.startswith("_")}
    assert wanted == {name for name in vars(FactoredWeightTransfer) if not name.startswith("_")}
    check_layout()


def test_a_token_that_trls_worker_cannot_send_is_refused_before_anything_is_loaded(monkeypatch):
    monkeypatch.setenv("FURA_ROLLOUT_TOKEN", "secret")
    with pytest.raises(ValueError, match=r"FURA_ROLLOUT_TOKEN is set.*sends no token"):
        FuraAsyncGRPOTrainer("no such model")


class Server:
    """A transport to a server that can be restarted: the claim and the version are gone then, as is its process."""

    address, payload_transport, dtype = "a server of this test", "inline", torch.float32
    lease_seconds, timeout = float("inf"), 1.0
    looks = pid = 0

    def __init__(self):
        self.restart()

    def restart(self):
        self.pid, self.owner, self.version = self.pid + 1, None, 0

    def call(self, method, info=None):
        error = None
        if method == "fura_status":
            self.looks += 1
        elif method == "fura_claim":
            self.owner = info["owner"]
        elif info["owner"] != self.owner:
            error = "nobody has claimed this engine"
        elif info.get("commit"):
            self.version = info["version"]
        status = {"pid": self.pid, "owner": self.owner, "version": self.version, "poisoned": None}
        return [status | {"error": error, "kind": "OwnershipError"}]

    def nothing(self, *_):
        pass

    pause = resume = stamp = wait_until_up = nothing


@pytest.fixture
def rollouts_of_a_server():
    """(trainer, server, engine synced to version 1, TRL's queue, what TRL takes out of it)."""
    PartialState()  # TRL's logger asks for it
    trainer = FuraAsyncGRPOTrainer.__new__(FuraAsyncGRPOTrainer)
    trainer.model_version, trainer.args, trainer.rollout_worker = 1, SimpleNamespace(max_staleness=2), None
    server = Server()
    engine = RestartableEngine(server, trainer._disown_rollouts)
    engine.prepare({}, {}, {})
    engine.push(update(1))
    rollouts = queue.Queue()
    taken = async_grpo_trainer.RolloutQueueDataset(
        VouchedQueue(rollouts, engine), lambda: trainer.model_version, None, 0.0, defaultdict(list), max_staleness=2
    )
    return trainer, server, engine, rollouts, iter(taken)


def update(version):
    return Update(version, version - 1, {"model.norm.weight": Factors("dense", {"weight": torch.ones(1)})}, read=None)


def rollout(number, model_version):
    return RolloutSample([], [], np.ones(1), np.ones(1), np.zeros(1), 0.0, model_version, number, {})


@pytest.mark.parametrize("found_by", ["the next rollout", "the next sync"])
def test_what_a_restarted_server_sampled_is_too_old_for_trl_to_take(rollouts_of_a_server, found_by):
    trainer, server, engine, rollouts, taken = rollouts_of_a_server
    rollouts.put(rollout(0, trainer.model_version))
    assert next(taken)["group_id"] == 0
    server.restart()
    if found_by == "the next sync":
        engine.push(update(2))
    rollouts.put(rollout(1, 1))  # of the base model, under the version that was synced before
    rollouts.put(rollout(2, 1 + trainer.args.max_staleness + 1))  # begun after the server had the policy again
    assert next(taken)["group_id"] == 2
    assert engine.serves_last()


def test_one_look_at_the_server_vouches_for_all_rollouts_that_were_queued_before_it(rollouts_of_a_server):
    _, server, _, rollouts, taken = rollouts_of_a_server
    looks = server.looks
    for number in range(3):
        rollouts.put(rollout(number, 1))
    assert [next(taken)["group_id"] for _ in range(3)] == [0, 1, 2]
    assert server.looks == looks + 1
    rollouts.put(rollout(3, 1))
    next(taken)
    assert server.looks == looks + 2, "what arrives after a look needs another"


@pytest.fixture
def make_trainer(rollout_server, tmp_path, monkeypatch):
    """(peft_config, **settings of AsyncGRPOConfig) -> a trainer on the real server, with attention in plain torch."""
    monkeypatch.setattr(packing, "_flash_attn", lambda: TorchFlashAttention)
    monkeypatch.setattr(async_grpo_trainer, "get_peak_flops_per_device", lambda *_: None)  # TRL asks CUDA for a name
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")]))  # for the worker
    rows = [{"prompt": [{"role": "user", "content": f"What is {a} + 11?"}]} for a in range(10, 30)]
    model = str(rollout_server.wait_until_up().model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.response_template = qwen3_template  # TRL asks for one, and knows the templates of published models
    return lambda peft_config, **settings: FuraAsyncGRPOTrainer(
        model,
        count_of_even_characters,
        args=AsyncGRPOConfig(
            output_dir=str(tmp_path), vllm_server_base_url=rollout_server.url, dtype="float32", use_cpu=True,
            bf16=False, num_generations=4, per_device_train_batch_size=8, max_completion_length=16, logging_steps=1,
            report_to="none", save_strategy="no", gradient_checkpointing=False, **settings,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=peft_config,
        sync_settings={"probe_every": 1},
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("method", PEFT_CONFIGS)
def test_async_grpo_trains_on_the_factored_sync(method, make_trainer):
    trainer = make_trainer(PEFT_CONFIGS[method], max_steps=3, learning_rate=1e-2)
    policy = trainer.model
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    trainer.train()
    reports = trainer.transfer.reports
    assert trainer.transfer.sync.audits.every is None, "as often as the time between syncs pays for audits"
    assert [report.version for report in reports] == [1, 2, 3, 4], "one cold sync, then one a step"
    assert max(report.probe_max_gap for report in reports) < PARITY_NATS
    assert reports[-1].payload_bytes < reports[-1].dense_bytes or method == "full"
    logged = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert logged
    assert all(entry["alarms/on"] == 0 for entry in logged), "its alarms watch by themselves"
    assert logged[0]["ratio"] == pytest.approx(1.0, abs=1e-4), "the first batch is sampled from the policy itself"
    changed = {name for name, p in policy.named_parameters() if not torch.equal(p, before[name])}
    assert changed, "it must learn something"
    assert changed <= {name for name, p in policy.named_parameters() if p.requires_grad}, "no base weight is written"


@pytest.mark.slow
def test_no_rollout_of_a_server_that_came_back_with_the_base_model_is_taken(make_trainer, rollout_server, monkeypatch):
    trainer = make_trainer(PEFT_CONFIGS["fura"], max_steps=1, learning_rate=0.0)
    policy = trainer.model
    perturb_trained(policy, 0.2, seed=0)
    start, rows, taken = trainer.rollout_worker.start, async_grpo_trainer.RolloutQueueDataset.__iter__, []

    def start_on_a_fresh_server():  # between the first sync and the first rollout
        rollout_server.kill()
        rollout_server.wait_until_up()
        start()

    def kept(dataset):
        for row in rows(dataset):
            taken.append(row)
            yield row

    monkeypatch.setattr(trainer.rollout_worker, "start", start_on_a_fresh_server)
    monkeypatch.setattr(async_grpo_trainer.RolloutQueueDataset, "__iter__", kept)
    trainer.train()
    assert taken
    for row in taken:
        scored = trainer._score(policy, row["input_ids"].tolist())
        sampled = torch.from_numpy(row["old_log_probs"])[1:]
        of_policy = torch.from_numpy(row["completion_mask"])[1:].bool()
        assert (scored - sampled)[of_policy].abs().max() < PARITY_NATS
