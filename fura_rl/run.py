"""One math run from parsed arguments to a printed table: config -> data -> trainer -> training -> report."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from transformers import AutoTokenizer, PreTrainedTokenizerBase, ProgressCallback, TrainerControl, TrainerState
from trl import ModelConfig, get_quantization_config

from fura_rl import checkpoint, report, serve
from fura_rl.adapters.registry import (
    check_method,
    find_method,
    own_settings,
    peft_config_for,
    target_names,
    trained_parameters,
)
from fura_rl.config import QUICKSTART, RunArguments, resolve_model
from fura_rl.data import digest_of, load_splits, pick_split, prepare
from fura_rl.evaluation.held_out import HeldOut
from fura_rl.fingerprint import check_base, describe_base, record
from fura_rl.interrupt import SaveOnInterrupt
from fura_rl.memory import OutOfMemory
from fura_rl.metrics_file import MetricsFile
from fura_rl.sync.payload_source import PayloadFolderError
from fura_rl.sync.probe import StaleEngineError
from fura_rl.sync.sharding import PeerFailedError
from fura_rl.sync.transport import EngineLostError, RemoteSyncError
from fura_rl.trainer import FuraGRPOTrainer
from rewards import WorkersError, load_reward

logger = logging.getLogger(__name__)

# What stops a run by design: the message says what happened and what mends it, so that no traceback is needed.
STOPS = (
    checkpoint.CheckpointError, FloatingPointError, OutOfMemory, StaleEngineError, EngineLostError, RemoteSyncError,
    PayloadFolderError, PeerFailedError, WorkersError,
)  # fmt: skip


@dataclass
class Run:
    """A run that is ready to train: everything is loaded, checked and started."""

    arguments: RunArguments
    trainer: FuraGRPOTrainer
    tokenizer: PreTrainedTokenizerBase
    held_out: HeldOut | None  # what is scored before and after training
    interrupt: SaveOnInterrupt
    base: dict[str, Any] | None  # what an adapter is trained on, as it is recorded beside it
    checkpoint: Path | None  # where the run goes on from
    before: report.Scores | None = None
    train_seconds: float = 0.0


class RewardProgress(ProgressCallback):
    """One progress bar with the reward on it, in place of a line of forty metrics a step."""

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: dict | None = None, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and self.training_bar is not None and "reward" in (logs or {}):
            shown = {"reward": "reward", "length": "completions/mean_length", "gap": "sync/probe_max_gap"}
            self.training_bar.set_postfix(
                {name: f"{float(logs[key]):.3g}" for name, key in shown.items() if key in logs}
            )


def prepare_run(arguments: RunArguments) -> Run:
    """Check every setting, load data and policy, start the rollout engine.

    Raises:
        ValueError, TypeError, OSError, NotImplementedError: with one message that names the setting; cheap checks come
            first, the engine last.
    """
    script, training, model_args = arguments.script, arguments.training, arguments.model
    settings = checkpoint.plain(arguments.resolved())
    load_as_the_method_asks(arguments)
    peft_config = peft_config_for(script.adapter, model_args, script.adapter_target_modules, script.adapter_kwargs)
    reward_funcs = [load_reward(name) for name in script.reward_funcs]
    model_path = stand_in_for(arguments) if script.dry_run else resolve_model(model_args.model_name_or_path)
    tokenizer = load_tokenizer(model_path, arguments)
    splits = load_splits(script, arguments.mixture)
    train_set = load_train_set(arguments, tokenizer, splits)
    held_out, evaluated = load_held_out(arguments, tokenizer, splits)
    # what a path in the settings stands for, and how many share a batch: a number of the training depends on these too
    settings |= {"contents_of_train_set": digest_of(train_set), "processes": training.world_size}
    start_from = find_checkpoint(arguments, settings)
    if start_from is not None:
        mend = "Put that one back, or name another output_dir to start anew"
        check_base(str(start_from), model_path, model_args.model_revision, mend=mend)

    training.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        "use_safetensors": True,  # weights of a hub model as pickle are refused
    } | (training.model_init_kwargs or {})
    interrupt = SaveOnInterrupt()
    base = (
        None if peft_config is None else describe_base(model_path, model_args.model_revision, quantization(model_args))
    )
    trainer = FuraGRPOTrainer(
        model=model_path,
        reward_funcs=reward_funcs,
        args=training,
        train_dataset=train_set,
        eval_dataset=None if evaluated is None else Dataset.from_dict({"prompt": evaluated.prompts}),
        held_out=evaluated,
        processing_class=tokenizer,
        peft_config=peft_config,
        quantization_config=get_quantization_config(model_args),
        callbacks=[interrupt, MetricsFile(Path(training.output_dir))],
    )
    trainer.checkpoint_writers.append(functools.partial(checkpoint.record_settings, settings=settings))
    if base is not None:
        trainer.checkpoint_writers.append(functools.partial(record, base=base))
    train_as_the_method_asks(trainer, arguments)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(RewardProgress)
    if training.save_strategy != "no":
        checkpoint.check_room(Path(training.output_dir), least_checkpoint_bytes(trainer), "nothing has been trained")
    if trainer.accelerator.is_main_process:
        report.write_record(Path(training.output_dir), arguments.resolved(), resumed=start_from is not None)
    return Run(arguments, trainer, tokenizer, held_out, interrupt, base, start_from)


def find_checkpoint(arguments: RunArguments, settings: dict[str, Any]) -> Path | None:
    """Where the run goes on from, None to start: the same command starts a run and continues it.

    Without `resume_from_checkpoint`, or with "latest", that is the newest whole checkpoint of `output_dir`, if there is
    one; with "true" there must be one; anything else names a checkpoint.

    Raises:
        ValueError: where `output_dir` cannot be written to, the named checkpoint is missing or damaged, or the run in
            `output_dir` was started with settings of other numbers.
    """
    training = arguments.training
    output_dir, wanted = Path(training.output_dir), training.resume_from_checkpoint or "latest"
    if arguments.script.dry_run:
        return None
    with training.main_process_first(local=False):
        checkpoint.check_output_dir(output_dir)
        checkpoint.clear_leftovers(output_dir)
        if wanted == "latest":
            found = checkpoint.last_checkpoint(output_dir)
        else:
            found = checkpoint.whole(output_dir, True if wanted in ("true", "True") else wanted)
    if found is None:
        return None
    recorded = checkpoint.recorded_settings(found)
    if recorded is None:
        logger.warning("%s does not say with which settings it was trained; they are not compared", found)
        return found
    changed = checkpoint.changed_settings(recorded, settings)
    shown = ", ".join(f"{name}={new!r} (there {old!r})" for name, (old, new) in changed.items())
    if changed and wanted == "latest":
        raise ValueError(
            f"output_dir={str(output_dir)!r} holds a run at step {checkpoint.step_of(found)} with other settings: "
            f"{shown}. Name another output_dir, remove that one, or go on with the new settings by "
            f"--resume_from_checkpoint {found}"
        )
    if changed:
        logger.warning("going on from %s with changed settings: %s", found, shown)
    return found


def least_checkpoint_bytes(trainer: FuraGRPOTrainer) -> int:
    """What a checkpoint takes at least: the trained tensors and two moments of each."""
    policy = trainer.accelerator.unwrap_model(trainer.model)
    return 3 * sum(p.numel() * p.element_size() for p in policy.parameters() if p.requires_grad)


def quantization(model_args: ModelConfig) -> str | None:
    """How the base is quantized, in the words of its record."""
    return model_args.bnb_4bit_quant_type if model_args.load_in_4bit else "int8" if model_args.load_in_8bit else None


def load_as_the_method_asks(arguments: RunArguments) -> None:
    """Quantized loading where the method means it, and a look at what the method cannot do.

    Raises:
        ValueError: see `check_method`; and where a quantized base is asked for without bitsandbytes.
    """
    script, model_args = arguments.script, arguments.model
    method = find_method(script.adapter)
    if method.load_in_4bit:
        model_args.load_in_4bit, model_args.bnb_4bit_quant_type, model_args.use_bnb_nested_quant = True, "nf4", True
    quantized = model_args.load_in_4bit or model_args.load_in_8bit
    check_method(script.adapter, quantized=quantized, beta=arguments.training.beta)
    if quantized and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(f"adapter={script.adapter!r} loads a quantized base: pip install 'fura-rl[quant]'")


def train_as_the_method_asks(trainer: FuraGRPOTrainer, arguments: RunArguments) -> None:
    """Freezing and optimizer of a method that has no PEFT config to bring them; trained tensors in float32.

    TRL casts what is trained over a quantized base to bfloat16, which swallows small steps and which no other method
    has to bear.
    """
    script = arguments.script
    method = find_method(script.adapter)
    policy = trainer.accelerator.unwrap_model(trainer.model)
    if getattr(policy, "is_quantized", False):
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    if method.freeze is not None:
        method.freeze(policy, target_names(script.adapter_target_modules, policy))
    if method.optimizer is not None:
        settings = own_settings(script.adapter, arguments.model, script.adapter_kwargs)
        trainer.optimizer_cls_and_kwargs = method.optimizer(trainer.args, settings)


def load_tokenizer(model_path: str, arguments: RunArguments) -> PreTrainedTokenizerBase:
    """Raises ValueError where neither folder nor hub has the model, saying what was tried."""
    try:
        return AutoTokenizer.from_pretrained(
            model_path,
            revision=arguments.model.model_revision,
            trust_remote_code=arguments.training.trust_remote_code,
            padding_side="left",
            truncation_side="left",
        )
    except OSError as error:
        first_line = str(error).strip().splitlines()[0]
        raise ValueError(
            f"model_name_or_path={arguments.model.model_name_or_path!r} is neither a local checkpoint nor a model that "
            f"the hub serves: {first_line}"
        ) from error


def load_train_set(arguments: RunArguments, tokenizer: PreTrainedTokenizerBase, splits: DatasetDict) -> Dataset:
    script = arguments.script
    source = script.dataset_name or "the dataset mixture"
    return prepare(pick_split(splits, script.dataset_train_split, source), script, tokenizer, source)


def load_held_out(
    arguments: RunArguments, tokenizer: PreTrainedTokenizerBase, splits: DatasetDict
) -> tuple[HeldOut | None, HeldOut | None]:
    """What is scored at both ends of training, and what `eval_strategy` scores during it.

    Raises:
        ValueError: where a split is missing or has too few problems.
    """
    script, training = arguments.script, arguments.training
    if not script.eval_problems:
        return None, None
    source = script.dataset_name or "the dataset mixture"

    def held_out(split: str) -> HeldOut:
        problems = pick_split(splits, split, source)
        if script.eval_problems > len(problems):
            raise ValueError(
                f"eval_problems={script.eval_problems} exceeds the {len(problems)} problems of {source}'s {split} split"
            )
        chosen = prepare(problems.select(range(script.eval_problems)), script, tokenizer, f"{source} ({split})")
        return HeldOut(
            tokenizer=tokenizer,
            prompts=list(chosen["prompt"]),
            golds=list(chosen["answer"]),
            samples=script.eval_samples,
            temperature=training.temperature,
            max_tokens=training.max_completion_length,
            seed=training.seed,
        )

    ends = held_out(script.dataset_test_split)
    if training.eval_strategy == "no":
        return ends, None
    split = script.dataset_eval_split or script.dataset_test_split
    return ends, ends if split == script.dataset_test_split else held_out(split)


def stand_in_for(arguments: RunArguments) -> str:
    """For a dry run: a tiny checkpoint of the model's architecture, and the embedded problems in place of the data."""
    from fura_rl.stand_in import make_stand_in

    folder = Path(tempfile.mkdtemp(prefix="fura-dry-run-"))
    name = resolve_model(arguments.model.model_name_or_path)
    arguments.script.dataset_name, arguments.mixture.datasets = QUICKSTART, []
    arguments.script.prompt_column = arguments.script.answer_column = None
    arguments.script.dataset_train_split = "train"
    arguments.training.output_dir = str(folder / "output")
    return str(make_stand_in(name, folder / "model", arguments.model.dtype))


def score_held_out(run: Run) -> report.Scores | None:
    """Greedy and sampled accuracy on the held-out problems, on the live engine, freshly synced."""
    if run.held_out is None:
        return None
    with run.trainer.synced_sampler() as llm:
        if llm is None:  # another process samples from the server
            return None
        scores, samples = run.held_out.score(llm), run.held_out.samples
    return report.Scores(
        greedy=scores["greedy"],
        pass_at_1=scores["pass@1"],
        pass_at_k=scores[f"pass@{samples}"],
        samples=samples,
        problems=len(run.held_out.prompts),
    )


def train(run: Run) -> None:
    """Score, train, save.  Ctrl-C ends it after the step in progress, with a checkpoint."""
    run.before = score_held_out(run)
    for phase in run.trainer.phase_seconds:
        run.trainer.phase_seconds[phase] = 0.0
    if run.checkpoint is not None and run.trainer.accelerator.is_main_process:
        print(f"going on from {run.checkpoint}", flush=True)
    started = time.perf_counter()
    run.trainer.train(resume_from_checkpoint=None if run.checkpoint is None else str(run.checkpoint))
    run.train_seconds = time.perf_counter() - started


def finish(run: Run) -> int:
    """Save the policy, score it, print the table, draw the curve.  Returns the exit code."""
    trainer, training = run.trainer, run.arguments.training
    output_dir = Path(training.output_dir)
    if run.interrupt.received is not None:
        step = trainer.state.global_step
        if trainer.accelerator.is_main_process:
            print(f"stopped at step {step}; the same command goes on from {output_dir / f'checkpoint-{step}'}")
        return 128 + run.interrupt.received
    after = score_held_out(run)
    trainer.save_model(str(output_dir))
    if not trainer.accelerator.is_main_process:
        return 0
    if run.base is not None:
        record(output_dir, run.base)
    if run.arguments.script.dry_run:
        return finish_dry_run(run)
    summary = summarize(run, after)
    report.print_summary(summary, output_dir)
    curve = output_dir / "reward_curve.png"
    report.plot_rewards(curve, summary.rewards, summary)
    if (best := trainer.state.best_model_checkpoint) is not None:
        print(f"best          {best} ({training.metric_for_best_model} {trainer.state.best_metric:.3f})")
    print(f"reward curve  {curve}\npolicy        {output_dir} (checkpoints in {output_dir}/checkpoint-*)")
    print(f"evaluate it   python launch/pass_at_k.py --model {output_dir}")
    if run.arguments.model.model_name_or_path == QUICKSTART:
        print(
            "next          a real model on a GPU: accelerate launch launch/grpo_math.py --config "
            "configs/qwen3-1.7b/fura.yaml\n"
            "              (add --dry_run to try that config on this machine first)"
        )
    return 0


def finish_dry_run(run: Run) -> int:
    gap = run.trainer.sync_reports[-1].probe_max_gap
    print(
        f"dry run: one GRPO step done with adapter {run.arguments.script.adapter!r} on a tiny stand-in for "
        f"{run.arguments.model.model_name_or_path}; probe gap {gap:.2g} nats. The config is sound."
    )
    shutil.rmtree(Path(run.arguments.training.output_dir).parent, ignore_errors=True)
    return 0


def summarize(run: Run, after: report.Scores | None) -> report.RunSummary:
    trainer, script = run.trainer, run.arguments.script
    policy = trainer.accelerator.unwrap_model(trainer.model)
    phases = {name: trainer.phase_seconds[name] for name in ("rollout", "reward", "sync")}
    if "evaluation" in trainer.phase_seconds:
        phases["evaluation"] = trainer.phase_seconds["evaluation"]
    phases["train"] = max(0.0, run.train_seconds - sum(phases.values()))
    return report.RunSummary(
        adapter=script.adapter,
        trained_parameters=trained_parameters(policy, script.adapter, run.arguments.model, script.adapter_kwargs),
        total_parameters=sum(p.numel() for p in policy.parameters()),
        steps=trainer.state.global_step,
        total_seconds=run.train_seconds,
        phase_seconds=phases,
        before=run.before,
        after=after,
        rewards=[float(entry["reward"]) for entry in trainer.state.log_history if "reward" in entry],
        evaluations=[(e["step"], e["eval_pass@1"]) for e in trainer.state.log_history if "eval_pass@1" in e],
    )


def die_with_parent(launched: bool | None = None) -> None:
    """Where another process launched this one, end (with a checkpoint) when it ends: no orphan keeps the machine busy.

    By default that is so under `accelerate launch`.
    """
    if launched is None:
        launched = any(name.startswith("ACCELERATE_") for name in os.environ)
    if launched:
        serve.die_with_parent()
