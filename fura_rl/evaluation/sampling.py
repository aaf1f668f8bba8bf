"""Sampling completions from a vLLM engine and grading them: every sample is kept, with its verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from fura_rl.data import encode_prompts
from fura_rl.evaluation.estimators import pass_at_k
from fura_rl.randomness import drawing_from
from rewards import Item, grade

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from vllm import LLM

HIGHEST_TEMPERATURE = 2.0  # of vLLM's SamplingParams, read in 0.31


@dataclass(frozen=True)
class Sampling:
    """How to sample: n completions a problem; temperature 0 is greedy."""

    n: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 1024
    seed: int = 0


@dataclass(frozen=True)
class Sample:
    """One completion and its verdict."""

    problem: int  # index of the problem
    sample: int  # index among the problem's samples
    text: str
    token_ids: list[int]
    answer: str | None  # content of the last closed box, or what followed "the answer is"
    gold: str
    correct: bool  # by a box; an answer in words alone is told apart by its `source`
    status: str  # a status of `rewards.Result`
    reason: str  # how it was decided, or what went wrong
    source: str | None  # "box" or "phrase"
    finish_reason: str  # "stop", or "length" where max_tokens cut it


@dataclass(frozen=True)
class Evaluation:
    """All samples of a set of problems, n for each, in order."""

    samples: list[Sample]
    n: int

    @property
    def correct_counts(self) -> list[int]:
        return [
            sum(sample.correct for sample in self.samples[start : start + self.n])
            for start in range(0, len(self.samples), self.n)
        ]

    def pass_at(self, k: int) -> float:
        """Mean over problems of the unbiased pass@k."""
        counts = self.correct_counts
        return sum(pass_at_k(self.n, c, k) for c in counts) / len(counts)

    def rows(self) -> list[dict[str, Any]]:
        return [asdict(sample) for sample in self.samples]


def evaluate(
    llm: LLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Any],
    golds: Sequence[str],
    sampling: Sampling,
    stop_token_ids: list[int] | None = None,
    progress: bool = True,
    first_problem: int = 0,
) -> Evaluation:
    """Sample `sampling.n` completions for every prompt and grade each with the reward's own grader.

    The same seed gives the same samples; the caller's random state is left as it was (see `randomness`).
    `first_problem` is the index of the first prompt in the benchmark.

    Raises:
        ValueError: where there are no prompts, or their number differs from that of the golds.
    """
    from vllm import SamplingParams

    if not prompts or len(prompts) != len(golds):
        raise ValueError(f"{len(prompts)} prompts and {len(golds)} golds cannot be evaluated")
    params = SamplingParams(
        n=sampling.n,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        max_tokens=sampling.max_tokens,
        stop_token_ids=stop_token_ids,
        detokenize=False,  # the tokenizer decodes all of them at once below
    )
    requests = [{"prompt_token_ids": ids} for ids in encode_prompts(prompts, tokenizer)]
    with drawing_from(sampling.seed):
        outputs = llm.generate(requests, params, use_tqdm=progress)
    drawn = [
        (problem, index, gold, completion)
        for problem, (output, gold) in enumerate(zip(outputs, golds, strict=True), first_problem)
        for index, completion in enumerate(output.outputs)
    ]
    texts = tokenizer.batch_decode([completion.token_ids for *_, completion in drawn], skip_special_tokens=True)
    items = [
        Item(text, gold, truncated=completion.finish_reason == "length")
        for text, (_, _, gold, completion) in zip(texts, drawn, strict=True)
    ]
    samples = [
        Sample(
            problem=problem,
            sample=index,
            text=text,
            token_ids=list(completion.token_ids),
            answer=verdict.answer,
            gold=gold,
            correct=verdict.correct and verdict.source == "box",
            status=verdict.status,
            reason=verdict.decided_by,
            source=verdict.source,
            finish_reason=str(completion.finish_reason),
        )
        for text, (problem, index, gold, completion), verdict in zip(
            texts, drawn, grade(items, mode="evaluation"), strict=True
        )
    ]
    return Evaluation(samples, sampling.n)
