"""One model on one benchmark: problems, engine, samples batch by batch, scores, table."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig

from fura_rl.data import encode_prompts
from fura_rl.evaluation.benchmarks.benchmark import Benchmark
from fura_rl.evaluation.estimators import doubling_ks
from fura_rl.evaluation.problems import Problem
from fura_rl.evaluation.run_folder import RunFolder
from fura_rl.evaluation.sampling import HIGHEST_TEMPERATURE, Sampling, evaluate
from fura_rl.evaluation.scores import summarize
from fura_rl.sync.vllm_engine import cpu_cache_settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from vllm import LLM

SAMPLES_PER_BATCH = 2048  # enough to fill an engine, little enough to lose in a kill


@dataclass(frozen=True)
class Batch:
    """Problems `start` to `stop` of one pass, which are sampled and written together."""

    name: str  # of the pass: "greedy" or "sampled"
    sampling: Sampling
    start: int
    stop: int

    @property
    def key(self) -> tuple[str, int]:
        return self.name, self.start

    @property
    def samples(self) -> int:
        return (self.stop - self.start) * self.sampling.n

    def seeded(self) -> Sampling:
        """The batch's own seed, so that a resumed run draws what an unkilled one draws."""
        digest = hashlib.sha256(f"{self.sampling.seed} {self.name} {self.start}".encode()).digest()
        return replace(self.sampling, seed=int.from_bytes(digest[:6], "big"))


def plan_passes(benchmark: Benchmark, *, greedy: bool | None = None, **overrides: Any) -> dict[str, Sampling]:
    """The passes of the benchmark's convention, with what the caller sets otherwise; None stands for the convention.

    Raises:
        ValueError: where nothing is left to do, or a setting has no meaning.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    sampling = replace(benchmark.sampling, **given)
    if sampling.n > 1 and sampling.temperature == 0.0:
        if "temperature" in given:
            raise ValueError(f"temperature=0 makes all {sampling.n} samples of a problem alike; use --num_samples 0")
        sampling = replace(sampling, temperature=1.0)
    n, temperature, highest = sampling.n, sampling.temperature, HIGHEST_TEMPERATURE
    possible = {
        f"num_samples={n}: expected 0 or more": n >= 0,
        f"temperature={temperature:g}: expected 0 to {highest:g}, the highest that vLLM samples at": (
            0 <= temperature <= highest
        ),
        f"top_p={sampling.top_p:g}: expected more than 0 and at most 1": 0 < sampling.top_p <= 1,
        f"max_tokens={sampling.max_tokens}: expected 1 or more": sampling.max_tokens >= 1,
    }
    if faults := [fault for fault, holds in possible.items() if not holds]:
        raise ValueError("; ".join(faults))
    passes = {}
    if benchmark.greedy if greedy is None else greedy:
        passes["greedy"] = replace(sampling, n=1, temperature=0.0, top_p=1.0)
    if sampling.n:
        passes["sampled"] = sampling
    if not passes:
        raise ValueError("neither greedy nor sampled: set --num_samples, or leave out --no_greedy")
    return passes


def choose_ks(ks: Sequence[int] | None, passes: dict[str, Sampling]) -> list[int]:
    """The k of pass@k: those asked for, else 1, 2, 4 ... up to the number of samples.

    Raises:
        ValueError: where some pass@k cannot be estimated from so many samples.
    """
    n = passes["sampled"].n if "sampled" in passes else 0
    if ks is None:
        return doubling_ks(n)
    if bad := [k for k in ks if not 1 <= k <= n]:
        raise ValueError(f"--k {' '.join(map(str, bad))} needs 1 <= k <= num_samples={n}; raise --num_samples")
    return sorted(set(ks))


def plan_batches(problems: int, passes: dict[str, Sampling]) -> list[Batch]:
    batches = []
    for name, sampling in passes.items():
        step = max(1, SAMPLES_PER_BATCH // sampling.n)
        batches += [Batch(name, sampling, start, min(start + step, problems)) for start in range(0, problems, step)]
    return batches


def start_engine(checkpoint: str, dtype: str, memory_utilization: float | None, seed: int) -> LLM:
    """A vLLM engine in this process; `dtype` "auto" is the checkpoint's own, where vLLM's would halve float32."""
    from vllm import LLM
    from vllm.platforms import current_platform

    if dtype == "auto":
        dtype = str(AutoConfig.from_pretrained(checkpoint).dtype or "auto").removeprefix("torch.")
    on_cpu = current_platform.is_cpu()
    memory_utilization = memory_utilization or (0.1 if on_cpu else 0.9)
    return LLM(
        model=checkpoint,
        dtype=dtype,
        seed=seed,
        enforce_eager=on_cpu,
        gpu_memory_utilization=memory_utilization,
        disable_log_stats=True,
        **(cpu_cache_settings(memory_utilization) if on_cpu else {}),
    )


def check_lengths(
    checkpoint: str, tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem], passes: dict[str, Sampling]
) -> None:
    """Raises ValueError where a prompt and its longest completion exceed what the model can hold."""
    limit = getattr(AutoConfig.from_pretrained(checkpoint).get_text_config(), "max_position_embeddings", None)
    longest = max(len(ids) for ids in encode_prompts([problem.prompt for problem in problems], tokenizer))
    wanted = max(sampling.max_tokens for sampling in passes.values())
    if limit is not None and longest + wanted > limit:
        raise ValueError(
            f"max_tokens={wanted} and the longest prompt of {longest} tokens exceed the model's {limit}; "
            f"use --max_tokens {limit - longest} or less"
        )


def sample_all(
    llm: LLM,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    batches: Sequence[Batch],
    folder: RunFolder,
) -> None:
    """Sample every batch that is not in the folder yet, one after another, each written as soon as it is graded."""
    from tqdm.auto import tqdm

    whole = folder.keep_whole_batches({batch.key: batch.samples for batch in batches})
    total, done = sum(batch.samples for batch in batches), sum(b.samples for b in batches if b.key in whole)
    with tqdm(total=total, initial=done, unit="sample", desc="sampling") as progress:
        for batch in batches:
            if batch.key not in whole:
                folder.append(sample_batch(llm, tokenizer, problems, batch))
                progress.update(batch.samples)


def sample_batch(
    llm: LLM, tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem], batch: Batch
) -> Iterator[dict[str, Any]]:
    chosen = problems[batch.start : batch.stop]
    llm.reset_prefix_cache()  # what was sampled before must not change how this batch is scheduled
    evaluation = evaluate(
        llm,
        tokenizer,
        [problem.prompt for problem in chosen],
        [problem.gold for problem in chosen],
        batch.seeded(),
        progress=False,
        first_problem=batch.start,
    )
    for row in evaluation.rows():
        prompt = problems[row["problem"]].prompt
        yield {"pass": batch.name, "batch": batch.start, **row, "prompt": prompt}


def score(folder: RunFolder, problems: Sequence[Problem], ks: Sequence[int]) -> dict[str, Any]:
    """The scores of a finished folder, written to its summary."""
    rows = folder.samples()
    summary = summarize(rows, [problem.groups for problem in problems], ks)
    folder.write_summary(summary)
    return summary


def print_summary(summary: dict[str, Any], title: str, passes: dict[str, Sampling], convention: str) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title=title, title_justify="left")
    for column, justify in (("measure", "left"), ("mean", "right"), ("95% interval", "right")):
        table.add_column(column, justify=justify)
    add_scores(table, summary["scores"])
    console.print(table)
    for name, part in summary["samples"].items():
        s = passes[name]
        console.print(
            f"{name}: {summary['problems']} problems, {s.n} each, temperature {s.temperature:g}, top-p {s.top_p:g}; "
            f"{part['truncated_frac']:.1%} cut at {s.max_tokens} tokens, {part['no_answer_frac']:.1%} without a box "
            f"({part['phrase_correct_frac']:.1%} right in words, not counted), {part['ungraded_frac']:.1%} not graded",
            highlight=False,
            soft_wrap=True,
        )
    if convention:
        console.print(f"convention: {convention}", highlight=False, soft_wrap=True)
    for column, groups in summary["groups"].items():
        part = Table(title=f"by {column}", title_justify="left")
        measures = list(summary["scores"])
        for heading in (column, "problems", *measures):
            part.add_column(heading, justify="left" if heading == column else "right")
        for name, group in groups.items():
            part.add_row(name, str(group["problems"]), *(f"{group['scores'][m]['mean']:.3f}" for m in measures))
        console.print(part)


def add_scores(table: Any, scores: dict[str, dict[str, float]], signed: bool = False) -> None:
    form = "+.3f" if signed else ".3f"
    for measure, value in scores.items():
        interval = f"{format(value['low'], form)} to {format(value['high'], form)}"
        table.add_row(measure, format(value["mean"], form), interval)
