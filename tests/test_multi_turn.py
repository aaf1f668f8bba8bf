"""Rollouts of more than one turn, as TRL has them: functions of the user's own, tools, environments."""

import json
import time
from importlib.resources import files

import pytest
from conftest import PARITY_NATS, forget_cut_engines, leave_weights_unpacked, make_random_checkpoint
from datasets import Dataset
from playing_processes import CALL, TURNS
from rollout_server import RolloutServer
from test_distributed import run_launched
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fura_rl import FuraConfig, FuraGRPOTrainer
from fura_rl.data import encode_prompts
from fura_rl.grpo_config import FuraGRPOConfig
from fura_rl.quickstart import BASE_MODEL

pytestmark = pytest.mark.slow


def train(model, folder, rows, reward, settings, **kwargs):
    """Three steps with an engine in this process, probed at every sync; the trainer and its log."""
    settings = {
        "output_dir": str(folder), "use_vllm": True, "vllm_mode": "colocate", "max_steps": 3, "num_generations": 4,
        "per_device_train_batch_size": 8, "learning_rate": 1e-2, "logging_steps": 1, "report_to": "none",
        "save_strategy": "no", "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "sync_probe_every": 1,
        "vllm_gpu_memory_utilization": 0.05,
    } | settings  # fmt: skip
    data = None if rows is None else Dataset.from_list(rows)
    config = FuraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    trainer = FuraGRPOTrainer(
        str(model), reward, FuraGRPOConfig(**settings), peft_config=config, train_dataset=data, **kwargs
    )
    trainer.train()
    return trainer, [entry for entry in trainer.state.log_history if "reward" in entry]


def letters(completions, **_):
    return [sum(map(ord, str(completion))) % 11 / 10 for completion in completions]


@pytest.mark.parametrize("shared", [False, True])
def test_a_rollout_function_of_two_turns_is_one_rollout(shared, tmp_path, monkeypatch):
    """Both turns of the policy that is trained, each with draws of its own; the time of both is that of rollouts."""
    if shared:
        leave_weights_unpacked(monkeypatch)
    first_turns = []

    def two_turns(prompts, trainer):
        ids = encode_prompts(prompts, trainer.processing_class)
        turns = [trainer.vllm_generation.generate(ids, None, num_generations=1)]
        seen = [prompt + completion for prompt, completion in zip(ids, turns[0][1], strict=True)]
        turns.append(trainer.vllm_generation.generate(seen, None, num_generations=1))
        again = trainer.vllm_generation.generate(ids, None, num_generations=1)[1]
        first_turns.append((turns[0][1], again))
        time.sleep(0.5)  # whatever a function does
        texts, logprobs = ([a + b for a, b in zip(*(turn[part] for turn in turns), strict=True)] for part in (1, 2))
        return {"prompt_ids": ids, "completion_ids": texts, "logprobs": [[lp[0] for lp in seq] for seq in logprobs]}

    rows = [{"prompt": f"{a} + 1 ="} for a in range(16)]
    settings = {"max_completion_length": 8, "vllm_share_weights": shared, "model_init_kwargs": {"dtype": "float32"}}
    trainer, log = train(BASE_MODEL, tmp_path, rows, letters, settings, rollout_func=two_turns)
    assert trainer.phase_seconds["rollout"] > 1.5, "by which audits are paid for"
    assert all(entry["sampling/sampling_logp_difference/max"] < 10 * PARITY_NATS for entry in log)
    assert log[1]["grad_norm"] > 0
    assert all(once != again for once, again in first_turns), "the same prompts, drawn for anew"


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """A random model with a byte for a token and Qwen3's chat template, by which tools are called."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([], trainers.BpeTrainer(initial_alphabet=alphabet, special_tokens=special))
    tokenizer.add_tokens(["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = (files("trl") / "chat_templates" / "qwen3.jinja").read_text()
    settings = {"vocab_size": len(fast), "max_position_embeddings": 2048, "eos_token_id": fast.eos_token_id}
    folder = make_random_checkpoint(tmp_path_factory.mktemp("talker") / "model", "qwen3", **settings)
    fast.save_pretrained(folder)
    return folder


class Counter:
    """An environment that makes its own prompt, has one tool and knows the reward."""

    def reset(self, **_):
        self.count = 0
        return "Count."

    def bump(self, by: int) -> str:
        """Counts on.

        Args:
            by: how far

        Returns:
            where it is then
        """
        self.count += by
        return str(self.count)

    def get_reward(self):
        return float(self.count)


@pytest.mark.parametrize(
    ("rows", "factory"),
    [
        ([{"environment": "counter"}] * 16, {"counter": Counter}),  # several environments: no column of prompts
        (None, Counter),
        ([{"prompt": [{"role": "user", "content": f"From {a}."}]} for a in range(16)], Counter),
    ],
    ids=["chosen by the row", "without a dataset", "with prompts"],
)
def test_environments_are_played_with_the_policy_that_is_trained(talker, tmp_path, rows, factory):
    settings = {
        "max_completion_length": 110, "vllm_structured_outputs_regex": CALL, "max_tool_calling_iterations": 1,
        "vllm_max_model_length": 1024, "max_steps": 2, "chat_template_kwargs": {"enable_thinking": False},
        "vllm_importance_sampling_correction": False,  # what a regex leaves open is not the policy's distribution
    }  # fmt: skip
    trainer, log = train(talker, tmp_path, rows, [], settings, environment_factory=factory)
    assert all(entry["tools/call_frequency"] == 1 for entry in log)
    assert all(entry["tools/failure_frequency"] == 0 for entry in log)
    assert all(entry["sync/probe_max_gap"] < PARITY_NATS for entry in log)
    assert all(entry["grad_norm"] > 0 for entry in log)
    assert trainer.phase_seconds["rollout"] > 0.1


@pytest.mark.parametrize("mode", ["server", "shared", "cut"])
def test_processes_whose_rollouts_take_different_turns_play_together(talker, tmp_path, mode):
    """Each is given the completions of its own prompts, and none waits for one that is done."""
    forget_cut_engines()
    server = RolloutServer(talker, tmp_path / "server.log", "--max-model-len", "2048") if mode == "server" else None
    try:
        url = [server.start().wait_until_up().url] if server else []
        done = run_launched("ddp", "tests/playing_processes.py", talker, tmp_path, mode, *url)
    finally:
        if server:
            server.stop()
    assert "Traceback" not in done.stderr, done.stderr[-5000:]
    notes = [json.loads((tmp_path / f"{process}.json").read_text()) for process in (0, 1)]
    for note in notes:
        assert [entry["tools/call_frequency"] for entry in note["log"]] == [sum(TURNS) / len(TURNS)] * 2
    assert [entry["step"] for entry in notes[0]["log"]] == [1, 2]
    assert all(entry["sync/probe_max_gap"] < PARITY_NATS for entry in notes[0]["log"])
    turns = [[len(pairs) for pairs in note["given"]] for note in notes]
    assert turns == [[4, 2, 2, 2] * 2, [4, 4, 0, 0] * 2], "of the last two the second process has none"
    for note in notes:
        made = [pair for pairs in (notes[0] if server else note)["made"] for pair in pairs]
        assert all(pair in made for pairs in note["given"] for pair in pairs)
