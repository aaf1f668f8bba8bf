"""One whole GRPO step on random models: generate, score, backward, AdamW; FuRA against LoRA and full fine-tuning.

Rewards are drawn, not computed: what is measured is the policy's work.  Conversion of the whole model is timed as well.
Before the timings the policy's log-probs are compared to those of a plain float32 model with the folded weights.
"""

from __future__ import annotations

import itertools
import time
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from fura_rl.adapters.fura_config import FuraConfig
from fura_rl.adapters.fura_tuner import PAPER_TARGETS
from fura_rl.benchmark import measure
from fura_rl.benchmark.measure import Settings
from fura_rl.benchmark.models import SIZES, projection_shapes, random_model, tied
from fura_rl.benchmark.reference import check_logprobs_against, float32_reference
from fura_rl.finite import all_finite

METHODS = ("fura", "lora", "full")
PROMPTS, ROLLOUTS = 2, 4
REFERENCE_BYTES = 8 * 2**30  # of the float32 model: all of Qwen3-1.7B, the first 4 decoder layers of a 7B


def run(settings: Settings) -> list[dict[str, Any]]:
    """One row per size and method, each on a model of its own, one after another so that peaks do not add up.

    What does not fit into memory is skipped with a line.
    """
    rows = []
    for size, method in settings.budget.units("step", list(itertools.product(settings.models, METHODS))):
        try:
            measure.require_memory(held_bytes(settings, size, method), settings.device)
            rows.append(measure_method(settings, size, method))
        except torch.OutOfMemoryError as error:
            settings.budget.skip("step", (size, method), str(error).splitlines()[0])
    ours = {row["model"]: row["train_s"] for row in rows if row["method"] == "fura"}
    for row in rows:
        row["fura_train_ratio"] = ours[row["model"]] / row["train_s"] if row["model"] in ours else None
    return rows


def held_bytes(settings: Settings, size: str, method: str) -> int:
    """What a step holds at least: the weights and, where they are trained, their gradients and AdamW's states."""
    model = random_model(size, torch.device("meta"), settings.dtype)
    return sum(p.nbytes for p in model.parameters()) * (4 if method == "full" else 1)


def make_policy(settings: Settings, size: str, method: str) -> tuple[nn.Module, float]:
    """The policy and the seconds that adapting it took."""
    model = random_model(size, settings.device, settings.dtype)
    started = time.perf_counter()
    if method == "fura":
        model = get_peft_model(model, FuraConfig(target_modules=PAPER_TARGETS))
    elif method == "lora":
        model = get_peft_model(model, LoraConfig(target_modules=PAPER_TARGETS, r=32, lora_alpha=32))
    measure.synchronize(settings.device)
    return model, time.perf_counter() - started


def measure_method(settings: Settings, size: str, method: str) -> dict[str, Any]:
    policy, adapt_seconds = make_policy(settings, size, method)
    policy.train()
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, weight_decay=0.0)
    length = 16 if size == "tiny" else 128
    vocabulary = policy.config.vocab_size
    prompts = torch.randint(3, vocabulary, (PROMPTS, length), device=settings.device).repeat_interleave(ROLLOUTS, 0)

    def rollout() -> torch.Tensor:
        with torch.no_grad():
            return policy.generate(
                input_ids=prompts, attention_mask=torch.ones_like(prompts), do_sample=True,
                min_new_tokens=length, max_new_tokens=length,
            )  # fmt: skip

    def train(sequences: torch.Tensor) -> None:
        rewards = torch.rand(PROMPTS, ROLLOUTS, device=settings.device)
        advantages = (rewards - rewards.mean(1, keepdim=True)).flatten()
        logprobs = completion_logprobs(policy, sequences, length)
        (-(advantages[:, None] * logprobs).mean()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    if method != "full":
        measure.move(policy)
    sequences = rollout()
    check_logprobs(settings, size, method, policy, sequences[:1], length)
    measure.release(settings.device)
    measure.synchronize(settings.device)
    started = settings.clock()
    rollout()  # timed once: it takes seconds where launches are slow
    measure.synchronize(settings.device)
    times = {"rollout_s": settings.clock() - started}
    train(sequences)
    states = [t for state in optimizer.state.values() for t in state.values()]
    if not all_finite([*trained, *states]):
        raise RuntimeError(f"{method}: a step of {size} in {settings.dtype} leaves non-finite values")
    times |= measure.interleaved_medians({"train_s": lambda: train(sequences)}, settings, warm_up=0)
    held = sum(t.nbytes for t in [*policy.parameters(), *policy.buffers(), *states])
    return {
        "model": size,
        "method": method,
        "trained": sum(p.numel() for p in trained),
        "adapt_s": adapt_seconds,
        **times,
        "peak_gb": (held + measure.peak_bytes(lambda: train(sequences), settings.device)) / 1e9,
    }


def completion_logprobs(model: nn.Module, sequences: torch.Tensor, length: int) -> torch.Tensor:
    """Log-probs (sequences, length), in float32, of the last `length` tokens of each."""
    logits = model(input_ids=sequences, logits_to_keep=length + 1).logits[:, :-1]
    return logits.float().log_softmax(-1).gather(-1, sequences[:, -length:, None])[..., 0]


# ---- the check of what is measured


@torch.no_grad()
def check_logprobs(
    settings: Settings, size: str, method: str, policy: nn.Module, sequences: torch.Tensor, length: int
) -> None:
    """The policy's log-probs against those of its folded weights in float32.

    Both run the first `checked_layers` decoder layers, which of a model that fits are all.

    Raises:
        RuntimeError: where they are further apart than rounding explains.
    """
    layers = checked_layers(size)
    config = policy.config
    whole, config.num_hidden_layers = config.num_hidden_layers, layers  # Qwen3's forward stops there
    try:
        logprobs = completion_logprobs(policy, sequences, length)
    finally:
        config.num_hidden_layers = whole
    reference = float32_reference(policy, size, settings.device, layers)
    what = f"{method}: log-probs of {size} ({layers} of {whole} decoder layers)"
    check_logprobs_against(
        reference, lambda model: completion_logprobs(model, sequences, length), what, logprobs, settings.dtype
    )


def checked_layers(size: str) -> int:
    """How many decoder layers of a model fit into REFERENCE_BYTES with the embeddings, one at least."""
    shape = SIZES[size]
    embeddings = shape["vocab_size"] * shape["hidden_size"] * (1 if tied(size) else 2)
    layer = sum(rows * columns for rows, columns in projection_shapes(size))
    return min(shape["num_hidden_layers"], max(1, (REFERENCE_BYTES // 4 - embeddings) // layer))
