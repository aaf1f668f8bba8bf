"""One cell of an ablation in a process of its own: train (or go on from a checkpoint), score, leave the figures.

    python -m fura_rl.ablation.cell FOLDER

FOLDER holds `cell.json` with the training options, the splits to score and how; `result.json` appears when all is done.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fura_rl.evaluation.run_folder import RunFolder

CELL, RESULT = "cell.json", "result.json"


def main(folder: Path) -> int:
    from fura_rl.checkpoint import step_of
    from fura_rl.config import parse_arguments
    from fura_rl.evaluation.run_folder import RunFolder
    from fura_rl.report import write_json
    from fura_rl.run import die_with_parent, prepare_run, summarize, train

    die_with_parent(launched=True)
    request = json.loads((folder / CELL).read_text())
    arguments = parse_arguments(request["options"])
    run = prepare_run(arguments)
    run.held_out = None  # scored below, on whole splits
    train(run)
    if run.interrupt.received is not None:
        return 128 + run.interrupt.received
    summary, reports = summarize(run, None), list(run.trainer.sync_reports)  # before scoring syncs once more
    memory = peak_memory_gib()
    scores = {split: score(run, folder, split, request["scoring"]) for split in request["splits"]}
    history = [entry for entry in run.trainer.state.log_history if "reward" in entry]
    result = {
        "trained_parameters": summary.trained_parameters,
        "steps": summary.steps,
        "steps_timed": summary.steps - (step_of(run.checkpoint) if run.checkpoint else 0),
        "phase_seconds": summary.phase_seconds,
        "peak_memory_gib": memory,
        "payload_bytes": reports[-1].payload_bytes if reports else None,
        "update_cosines": [report.update_cosine for report in reports],
        "rewards": summary.rewards,
        "evaluations": summary.evaluations,
        "lengths": [entry.get("completions/mean_length") for entry in history],
        "probe_max_gap": max((report.probe_max_gap or 0.0 for report in reports), default=None),
        "scores": scores,
    }
    if "test" in request["splits"]:  # a cell of the table, not one that only chooses the learning rate
        result |= distance_to_base(run, RunFolder(folder / "test"))
    write_json(folder / RESULT, result)
    return 0


def score(run: Any, folder: Path, split: str, scoring: dict[str, Any]) -> dict[str, Any]:
    """Every sample of a split to FOLDER/SPLIT, on the live engine, freshly synced; its summary."""
    from fura_rl.evaluation.benchmarks import find_benchmark
    from fura_rl.evaluation.pass_at_k import plan_batches, plan_passes, sample_all
    from fura_rl.evaluation.pass_at_k import score as summarize_folder
    from fura_rl.evaluation.problems import content_hash, load_problems
    from fura_rl.evaluation.run_folder import RunFolder
    from fura_rl.report import environment

    benchmark = find_benchmark(scoring[split])
    problems = load_problems(benchmark, run.tokenizer, max_problems=scoring["max_problems"])
    training = run.arguments.training
    passes = plan_passes(
        benchmark, n=scoring["num_samples"], max_tokens=training.max_completion_length, seed=training.seed
    )
    settings = {
        "benchmark": scoring[split],
        "problems": len(problems),
        "content_hash": content_hash(problems),
        "passes": {name: {"n": sampling.n} for name, sampling in passes.items()},
        "ks": scoring["k"],
    }
    target = RunFolder.open(folder / split, settings, environment())
    with run.trainer.synced_sampler() as llm:
        sample_all(llm, run.tokenizer, problems, plan_batches(len(problems), passes), target)
    return summarize_folder(target, problems, scoring["k"])


def peak_memory_gib() -> float:
    """The most memory held so far: of the GPU where there is one, else of this process, its engine included."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def distance_to_base(run: Any, samples: RunFolder) -> dict[str, Any]:
    """The KL to the base on one completion of every test problem, and the shape of the update beside the base."""
    from dataclasses import asdict

    from transformers import AutoModelForCausalLM

    from fura_rl.ablation.diagnostics import divergence, sampled_tokens, update_summary
    from fura_rl.adapters.registry import target_names
    from fura_rl.config import resolve_model

    trainer, arguments = run.trainer, run.arguments
    policy = trainer.accelerator.unwrap_model(trainer.model)
    name = resolve_model(arguments.model.model_name_or_path)
    base = AutoModelForCausalLM.from_pretrained(name, **arguments.training.model_init_kwargs)
    base.to(next(policy.parameters()).device)
    prompts, completions = sampled_tokens(samples.samples(), run.tokenizer)
    with trainer.accelerator.autocast():
        kl = divergence(policy, base, prompts, completions)
    targets = target_names(arguments.script.adapter_target_modules, base)
    return {"divergence": asdict(kl), "update": update_summary(policy, base.state_dict(), targets)}


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
