"""One process of a trainer of two whose rollouts call tools, run by test_multi_turn.py under `accelerate launch`.

    playing_processes.py MODEL FOLDER server URL
    playing_processes.py MODEL FOLDER shared
    playing_processes.py MODEL FOLDER cut

Two steps of four prompts, two in each process, whose rollouts take 1, 4, 2 and 2 turns; with a server, with an engine
in each process that shares the policy's weights, or with one engine that is cut up between them.  Writes
FOLDER/PROCESS.json: the completions that this process was given and those that the engine made, turn by turn and each
with its prompt, and the log.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import leave_weights_unpacked
from datasets import Dataset

from fura_rl import FuraConfig, FuraGRPOTrainer
from fura_rl.grpo_config import FuraGRPOConfig

TURNS = [1, 4, 2, 2]
CALL = r'<tool_call>\n\{"name": "bump", "arguments": \{"by": [0-9]\}\}\n</tool_call>'


class Counter:
    """Answers shortly before the last turn, and in it at a length that no completion has room for."""

    def reset(self, turns: int, **_: Any) -> None:
        self.left, self.count = turns, 0

    def bump(self, by: int) -> str:
        """Counts on.

        Args:
            by: how far

        Returns:
            where it is then
        """
        self.left, self.count = self.left - 1, self.count + by
        return str(self.count) if self.left else "x" * 1000

    def get_reward(self) -> float:
        return float(self.count)


def noting(place: Any, pairs_of: Callable[[Any, Any], list[Any]]) -> list[list[Any]]:
    """What `place.generate` is asked for from now on, as `pairs_of(prompts, result)` puts it."""
    generate, noted = place.generate, []

    def noting_generate(prompts: list[Any], *args: Any, **kwargs: Any) -> Any:
        result = generate(prompts, *args, **kwargs)
        noted.append([[prompt, list(completion)] for prompt, completion in pairs_of(prompts, result)])
        return result

    place.generate = noting_generate
    return noted


def of_client(prompts: list[list[int]], result: dict[str, Any]) -> list[Any]:
    each = len(result["completion_ids"]) // len(prompts)
    return [(prompts[i // each], completion) for i, completion in enumerate(result["completion_ids"])]


def of_engine(_: Any, outputs: list[Any]) -> list[Any]:
    return [(output.prompt_token_ids, output.outputs[0].token_ids) for output in outputs]


def main(model: str, folder: str, mode: str, *url: str) -> None:
    rows = [{"prompt": [{"role": "user", "content": f"Count from {i}."}], "turns": TURNS[i % 4]} for i in range(8)]
    if mode == "shared":
        leave_weights_unpacked(pytest.MonkeyPatch())
    where = {
        "server": {"vllm_mode": "server", "vllm_server_base_url": next(iter(url), None)},
        "shared": {"vllm_mode": "colocate", "vllm_share_weights": True},
        "cut": {"vllm_mode": "colocate", "vllm_tensor_parallel_size": 2},
    }
    args = FuraGRPOConfig(
        output_dir=folder, use_vllm=True, max_steps=2, num_generations=2, per_device_train_batch_size=4,
        shuffle_dataset=False, learning_rate=1e-2, logging_steps=1, report_to="none", save_strategy="no", use_cpu=True,
        bf16=False, gradient_checkpointing=False, sync_probe_every=1, vllm_gpu_memory_utilization=0.05,
        max_completion_length=600, vllm_max_model_length=2048, vllm_structured_outputs_regex=CALL,
        max_tool_calling_iterations=6, chat_template_kwargs={"enable_thinking": False},
        vllm_importance_sampling_correction=False,  # what a regex leaves open is not the policy's distribution
        **where[mode],
    )  # fmt: skip
    trainer = FuraGRPOTrainer(
        model, [], args, peft_config=FuraConfig(task_type="CAUSAL_LM", target_modules="all-linear"),
        train_dataset=Dataset.from_list(rows), environment_factory=Counter,
    )  # fmt: skip
    generation = trainer.vllm_generation
    given = noting(generation, lambda prompts, result: zip(prompts, result[1], strict=True))
    if generation.mode == "colocate":
        made = noting(generation.llm, of_engine)
    else:
        made = noting(trainer._client, of_client) if trainer._client else []
    trainer.train()
    noted = {"given": given, "made": made, "log": [entry for entry in trainer.state.log_history if "reward" in entry]}
    (Path(folder) / f"{trainer.accelerator.process_index}.json").write_text(json.dumps(noted))
    trainer.end()


if __name__ == "__main__":
    main(*sys.argv[1:])
