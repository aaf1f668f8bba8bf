"""TRL's AsyncGRPO with a real rollout server and TRL's own rollout worker: every adapter, base weights untouched."""

import os

import pytest
import torch
from conftest import PARITY_NATS, REPOSITORY
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer
from trl.chat_template_utils import qwen3_template
from trl.experimental.async_grpo import AsyncGRPOConfig, async_grpo_trainer, packing
from trl.experimental.async_grpo.weight_transfer import WeightTransferClient

from fura_rl import FuraConfig
from fura_rl.async_grpo import FactoredWeightTransfer, FuraAsyncGRPOTrainer, check_layout

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


@pytest.mark.slow
@pytest.mark.parametrize("method", PEFT_CONFIGS)
def test_async_grpo_trains_on_the_factored_sync(method, rollout_server, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "_flash_attn", lambda: TorchFlashAttention)
    monkeypatch.setattr(async_grpo_trainer, "get_peak_flops_per_device", lambda *_: None)  # TRL asks CUDA for a name
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")]))  # for the worker
    rows = [{"prompt": [{"role": "user", "content": f"What is {a} + 11?"}]} for a in range(10, 30)]
    model = str(rollout_server.wait_until_up().model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.response_template = qwen3_template  # TRL asks for one, and knows the templates of published models
    trainer = FuraAsyncGRPOTrainer(
        model,
        count_of_even_characters,
        args=AsyncGRPOConfig(
            output_dir=str(tmp_path), vllm_server_base_url=rollout_server.url, dtype="float32", use_cpu=True,
            bf16=False, max_steps=3, num_generations=4, per_device_train_batch_size=8, max_completion_length=16,
            learning_rate=1e-2, logging_steps=1, report_to="none", save_strategy="no", gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=PEFT_CONFIGS[method],
        sync_settings={"probe_every": 1},
    )  # fmt: skip
    policy = trainer.model
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    trainer.train()
    reports = trainer.transfer.reports
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
