"""Held-out problems scored while a policy trains, on the engine that its rollouts come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fura_rl.evaluation.estimators import doubling_ks
from fura_rl.evaluation.sampling import Sampling, evaluate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from vllm import LLM


@dataclass(frozen=True)
class HeldOut:
    """Problems, and how they are sampled: once greedily, and `samples` times at `temperature`.

    `prompts` are chat messages or text.  `seed` makes two evaluations of the same weights alike, and evaluations of
    different weights comparable; the random state of the caller is left as it was.

    Raises:
        ValueError: where there are no problems, or no samples.
    """

    tokenizer: PreTrainedTokenizerBase
    prompts: Sequence[Any]
    golds: Sequence[str]
    samples: int
    temperature: float
    max_tokens: int
    seed: int

    def __post_init__(self) -> None:
        if not self.prompts or len(self.prompts) != len(self.golds):
            raise ValueError(f"{len(self.prompts)} prompts and {len(self.golds)} golds cannot be evaluated")
        if self.samples < 1:
            raise ValueError(f"eval_samples={self.samples} must be at least 1")

    @property
    def measures(self) -> list[str]:
        """What `score` returns: greedy, and pass@k for k = 1, 2, 4 ... and the number of samples."""
        return ["greedy", *(f"pass@{k}" for k in doubling_ks(self.samples))]

    def score(self, llm: LLM) -> dict[str, float]:
        """The mean of every measure over the problems, in 0..1."""

        def sample(n: int, temperature: float) -> Any:
            sampling = Sampling(n=n, temperature=temperature, max_tokens=self.max_tokens, seed=self.seed)
            return evaluate(llm, self.tokenizer, self.prompts, self.golds, sampling, progress=False)

        sampled = sample(self.samples, self.temperature)
        scores = {"greedy": sample(1, 0.0).pass_at(1)}
        return scores | {f"pass@{k}": sampled.pass_at(k) for k in doubling_ks(self.samples)}


def metric_faults(metric: str | None, held_out: HeldOut) -> list[str]:
    """What is wrong with transformers' `metric_for_best_model`, which would be told only at the first evaluation."""
    if metric is None or metric.removeprefix("eval_") in held_out.measures:
        return []
    return [f"metric_for_best_model={metric!r} is not measured; use one of {', '.join(held_out.measures)}"]
