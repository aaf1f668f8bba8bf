"""The trainer without vLLM: TRL's own generation, under the same alarms and the same clock."""

import time

from datasets import Dataset

from fura_rl import FuraConfig, FuraGRPOTrainer
from fura_rl.data import encode_prompts
from fura_rl.grpo_config import FuraGRPOConfig
from fura_rl.quickstart import BASE_MODEL


def odd(completions, **_):
    time.sleep(0.1)
    return [float(len(text) % 2) for text in completions]


def trainer_of(folder, **kwargs):
    rows = [{"prompt": f"{a} + 1 =", "answer": str(a + 1)} for a in range(8)]
    return FuraGRPOTrainer(
        model=str(BASE_MODEL),
        reward_funcs=odd,
        args=FuraGRPOConfig(
            output_dir=str(folder), num_generations=4, per_device_train_batch_size=4, use_cpu=True, bf16=False,
            max_completion_length=32, report_to="none", max_steps=2,
        ),
        train_dataset=Dataset.from_list(rows),
        peft_config=FuraConfig(target_modules=["up_proj"]),
        **kwargs,
    )  # fmt: skip


def test_rollouts_that_transformers_generates_are_told_from_training(tmp_path):
    trainer = trainer_of(tmp_path)
    started = time.perf_counter()
    trainer.train()
    taken = time.perf_counter() - started
    phases = trainer.phase_seconds
    assert phases["reward"] >= 0.2
    assert 0 < phases["rollout"] < taken - phases["reward"]


def test_so_are_those_of_a_function(tmp_path):
    def rollout(prompts, trainer):
        time.sleep(0.1)
        ids = encode_prompts(prompts, trainer.processing_class)
        completions = [[5 + i, 6, 7] for i in range(len(ids))]
        return {"prompt_ids": ids, "completion_ids": completions, "logprobs": None}

    trainer = trainer_of(tmp_path, rollout_func=rollout)
    trainer.train()
    assert trainer.phase_seconds["rollout"] >= 0.2
