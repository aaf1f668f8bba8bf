"""`FuraGRPOTrainer`: TRL's GRPOTrainer with our weight sync in place of its merge, push and unmerge.

The only file that touches TRL's private names.  Read in TRL 1.16; `take_over` looks for each of them, so that an
upgrade that moves one ends with a message.  Everything else of TRL's trainer is used as it is.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import shutil
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
import trl.generation.vllm_generation as trl_vllm
from accelerate.utils import broadcast_object_list, gather_object
from peft import PeftConfig
from safetensors import SafetensorError
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import TrainOutput
from trl import GRPOConfig, GRPOTrainer

from fura_rl import checkpoint
from fura_rl.adapters.fura_config import FuraConfig
from fura_rl.adapters.fura_tuner import restore_core_dtype
from fura_rl.alarms import (
    Alarms,
    AlarmSettings,
    importance_cut_frac,
    refuse_non_finite_rollouts,
    refuse_non_finite_weights,
)
from fura_rl.data import encode_prompts
from fura_rl.evaluation.held_out import HeldOut
from fura_rl.memory import out_of_memory_in
from fura_rl.randomness import drawing_from, rollout_seed
from fura_rl.rollout_client import RolloutClient, ServerSampler, client_factory
from fura_rl.serve import free_port
from fura_rl.sync import probe
from fura_rl.sync.engine import RolloutEngine
from fura_rl.sync.fold import check_folds
from fura_rl.sync.remote_engine import Follower
from fura_rl.sync.sharding import failing_together, in_any_process
from fura_rl.sync.single_copy import SingleCopyEngine, move_to_host
from fura_rl.sync.vllm_engine import InProcessEngine, cpu_cache_settings, engine_environment
from fura_rl.sync.vllm_private import keeping_classes
from fura_rl.sync.weight_sync import SyncReport, WeightSync
from fura_rl.trainer_settings import check_settings

logger = logging.getLogger(__name__)

TRL_VERSIONS_READ = "1.16"
PROBE_TOKENS = 64


class FuraGRPOTrainer(GRPOTrainer):
    """GRPO on a vLLM engine that provably serves the policy being trained.

    Takes TRL's arguments unchanged; `peft_config` is any PEFT config, or None for full fine-tuning, and `args` a
    `GRPOConfig` or `FuraGRPOConfig`.  Logs `sync/*` at every sync and `alarms/*` with every line, and keeps
    `phase_seconds`, the wall time of the rollout, reward, sync and evaluation phases.

    Where `held_out` is given, transformers' `eval_strategy`, `eval_steps` and `eval_on_start` evaluate it in place of
    TRL's loop over `eval_dataset` (which transformers wants all the same): `eval_greedy`, `eval_pass@1`, ... are
    logged, and `metric_for_best_model`, `load_best_model_at_end` and `save_strategy="best"` go by them.

    A run that was killed and goes on from its last checkpoint reaches what an uninterrupted one reaches, bit for bit on
    the same machine with the engine in its process, or on a server with `vllm_server_seeded`.  `checkpoint_writers`
    are called with the folder of each checkpoint before it is given its name, to put further files into it.

    Raises:
        ValueError: for settings that this trainer cannot serve, before a model is loaded.
        StaleEngineError: where an engine does not hold the policy's weights after a sync.
    """

    _tag_names: ClassVar[list[str]] = ["trl", "grpo", "fura"]
    _saving = False

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        peft_config: PeftConfig | None = None,
        held_out: HeldOut | None = None,
        **kwargs: Any,
    ) -> None:
        check_settings(args, peft_config, held_out)
        self.held_out = held_out
        self.phase_seconds: dict[str, float] = defaultdict(float)
        self.sync_reports: list[SyncReport] = []
        self.checkpoint_writers: list[Callable[[Path], None]] = []
        self._rollouts_at = (-1, True, 0)  # optimizer step, whether of training, generations there so far
        self._in_rollout = self._in_tool_calls = False
        rewards = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        timed = [self._timed("reward", reward) if callable(reward) else reward for reward in rewards if reward]
        self._client: RolloutClient | None = None
        transport = getattr(args, "sync_transport", "auto")
        client = client_factory(transport, keep=lambda client: setattr(self, "_client", client))
        # TRL looks for a free port among the same few in every process: two runs that start together would take one
        os.environ.setdefault("MASTER_PORT", str(free_port()))
        with trl_builds_with(LLM=self._make_engine, VLLMClient=client):
            super().__init__(model, timed, args, peft_config=peft_config, **kwargs)
        keep_core_dtype(self.accelerator.unwrap_model(self.model))
        self.alarms = Alarms(self.args if isinstance(self.args, AlarmSettings) else AlarmSettings())
        self.callback_handler.callbacks.insert(0, self.alarms)  # before the reporters, which shall see its counters
        if self.use_vllm:
            self._take_over_sync()
        elif self.rollout_func is not None:
            self.rollout_func = self._timed("rollout", self.rollout_func)

    def _make_engine(self, **kwargs: Any) -> Any:
        """vLLM's `LLM` with TRL's arguments and those TRL has no setting for.

        Raises:
            NotImplementedError: for a policy that the weight sync cannot fold, before the engine takes its minutes.
        """
        check_folds(self.accelerator.unwrap_model(self.model))
        from vllm import LLM

        enforce_eager = getattr(self.args, "vllm_enforce_eager", None)
        kwargs["dtype"] = getattr(self.args, "vllm_dtype", None) or str(self.compute_dtype).removeprefix("torch.")
        on_cpu = self.accelerator.device.type == "cpu"
        kwargs["enforce_eager"] = on_cpu if enforce_eager is None else enforce_eager
        if on_cpu:
            kwargs |= cpu_cache_settings(kwargs["gpu_memory_utilization"])
        for name, value in engine_environment(kwargs["dtype"]).items():
            os.environ.setdefault(name, value)
        kwargs["quantization"] = None  # a quantized policy is served folded, in 16 bits: never quantized a second time
        kwargs["revision"] = (self.args.model_init_kwargs or {}).get("revision")
        kwargs["seed"] += self.args.seed  # TRL seeds every run's engine alike, and with it this process
        kwargs["disable_log_stats"] = True
        kwargs["load_format"] = "safetensors"  # vLLM would take pickled weights where there are no others
        if self._shares_weights:
            move_to_host(self.accelerator.unwrap_model(self.model))
        models = self.model, self.ref_model, *self.reward_funcs
        with keeping_classes(*(model for model in models if isinstance(model, nn.Module))):
            return LLM(**kwargs)

    @property
    def compute_dtype(self) -> torch.dtype:
        """What the policy's forward runs in: the autocast dtype, or that of its parameters."""
        mixed = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision)
        return mixed or self.accelerator.unwrap_model(self.model).dtype

    def _take_over_sync(self) -> None:
        generation = take_over(self)
        policy = self.accelerator.unwrap_model(self.model)
        if generation.mode == "server":  # an engine of this process was not started without it
            check_folds(policy)
        self.weight_sync = WeightSync(
            policy,
            self._rollout_engine(generation),
            probe_token_ids(self.train_dataset, self.processing_class),
            mode=getattr(self.args, "sync_mode", "auto"),
            probe_every=getattr(self.args, "sync_probe_every", 10),
            probe_tolerance=getattr(self.args, "sync_probe_tolerance", None),
            audit_every=getattr(self.args, "sync_audit_every", None),
            rollout_seconds=lambda: self.phase_seconds["rollout"],
            rounding=getattr(self.args, "fold_rounding", "nearest"),
            seed=self.args.seed,
            compute_dtype=self.compute_dtype,
            score=self._score,
        )
        generation.sync_weights = self.sync_weights
        generation.generate = self._as_rollout(self._evenly(generation.generate))
        if self.rollout_func is not None:
            self.rollout_func = self._as_rollout(self.rollout_func)

    def _rollout_engine(self, generation: Any) -> RolloutEngine:
        """The engine as this process sees it: in this process, behind a server, or as another process's business."""
        if self._shares_weights:
            return SingleCopyEngine(generation.llm, self.accelerator.unwrap_model(self.model))
        if generation.mode == "colocate":
            return InProcessEngine(generation.llm)
        dtype = [str(self._client.engine.dtype).removeprefix("torch.") if self._client else None]
        broadcast_object_list(dtype, from_process=0)
        return self._client.engine if self._client else Follower(getattr(torch, dtype[0]))

    @property
    def sampler(self) -> Any:
        """What held-out problems are sampled from: the live `vllm.LLM`, a stand-in for it before a server, or None in
        a process that has neither."""
        if self.vllm_generation.mode == "colocate":
            return self.vllm_generation.llm
        return ServerSampler(self._client) if self._client else None

    @contextmanager
    def synced_sampler(self) -> Iterator[Any]:
        """`sampler`, freshly synced, for as long as the policy need not compute."""
        self.sync_weights()
        try:
            yield self.sampler
        finally:
            self._take_weights_back()

    def sync_weights(self) -> None:
        """Bring the engine to the policy's weights and prove it.  TRL calls this before a generation of a new step."""
        generation = self.vllm_generation
        started = time.perf_counter()
        asleep = generation.mode == "colocate" and generation.enable_sleep_mode
        if asleep:  # the engine gave its memory back, weights included (sleep level 2)
            trl_vllm.empty_cache()
            generation.llm.wake_up(tags=["weights"])
            generation.llm.wake_up(tags=["kv_cache"])  # the probe generates; TRL's own wake-up is then a no-op
            generation._llm_weights_sleeping = False
        with out_of_memory_in("weight sync"):
            report = self.weight_sync.sync(everything=asleep)
        self.sync_reports.append(report)
        self._last_loaded_step = self.state.global_step
        self.accelerator.wait_for_everyone()
        mode = "train" if self.model.training else "eval"
        for name, value in report.metrics().items():
            self._metrics[mode][name].append(value)
        self.phase_seconds["sync"] += time.perf_counter() - started

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's, timed as a rollout where transformers generates: with vLLM that is timed closer by."""
        if self._in_tool_calls:
            in_any_process(True)  # as those ask that are done
        generate = super()._generate_single_turn
        return (generate if self.use_vllm else self._timed("rollout", generate))(*args, **kwargs)

    def _tool_call_loop(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's, as many turns in every process as in the one whose rollouts take most.

        In TRL a process leaves the loop once its own rollouts call no tool, while the others sync and sample in turns
        that they take together with it (https://github.com/huggingface/trl/pull/6673): they would wait for it for
        ever, or be answered by whatever it exchanges next.
        """
        if not self.use_vllm:
            return super()._tool_call_loop(*args, **kwargs)
        self._in_tool_calls = True
        try:
            rollouts = super()._tool_call_loop(*args, **kwargs)
        finally:
            self._in_tool_calls = False
        while in_any_process(False):
            self._generate_single_turn([], None, {}, num_generations=1)
        return rollouts

    def _evenly(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        """`generate` where processes sample in one batch, of which TRL takes every one to have as many prompts as
        itself: those with fewer fill up, with empty prompts where the client then asks nothing for them."""
        if self.vllm_generation.mode == "server":
            filler = []
        elif self.args.vllm_tensor_parallel_size > 1:
            filler = [self._tokenizer.eos_token_id]
        else:
            return generate

        @functools.wraps(generate)
        def evenly(prompts: list[list[int]], images: list | None, num_generations: int, **kwargs: Any) -> tuple:
            missing = max(gather_object([len(prompts)])) - len(prompts)
            filled = prompts + [filler] * missing, images if images is None else images + [None] * missing
            parts = generate(*filled, num_generations, **kwargs)
            return tuple(part if part is None else part[: len(prompts)] for part in parts)

        return evenly

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's batch, after a look at what TRL passes over: rollouts of another version than the policy's, log-probs
        that are not finite, and how many importance-sampling ratios were masked or clipped."""
        batch = super()._generate_and_score_completions(inputs)
        mask = batch["completion_mask"] * batch.get("tool_mask", 1)
        if self.use_vllm:
            with failing_together():
                version = self.weight_sync.version_served()
            self._logs["extra"]["policy_version"].extend(gather_object([version] * len(inputs)))
        with failing_together():
            if "sampling_per_token_logps" in batch:
                refuse_non_finite_rollouts(batch["sampling_per_token_logps"], mask)
        if "importance_sampling_ratio" in batch:
            bounds = self.args.vllm_importance_sampling_clip_min, self.args.vllm_importance_sampling_clip_max
            share = importance_cut_frac(batch["importance_sampling_ratio"], mask, *bounds)
            shares = self.accelerator.gather(torch.tensor(share, device=self.accelerator.device))
            mode = "train" if self.model.training else "eval"
            self._metrics[mode]["sampling/importance_sampling_ratio/cut_frac"].append(shares.mean().item())
        return batch

    def _score(self, policy: nn.Module, token_ids: Sequence[int]) -> torch.Tensor:
        with self.accelerator.autocast():
            return probe.trainer_logprobs(policy, token_ids)

    def _timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            sync_before, started = self.phase_seconds["sync"], time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                inner_sync = self.phase_seconds["sync"] - sync_before  # a sleeping engine syncs inside generate
                self.phase_seconds[phase] += time.perf_counter() - started - inner_sync

        return timed

    def _as_rollout(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        """`generate` seeded, timed and with the policy's weights back in their place afterwards; within a
        `rollout_func` only seeded, since that is timed itself and may generate again."""
        seeded = self._seeded(generate)
        timed = self._timed("rollout", out_of_memory_in("rollouts")(seeded))

        @functools.wraps(generate)
        def rollout(*args: Any, **kwargs: Any) -> Any:
            if self._in_rollout:
                return seeded(*args, **kwargs)
            self._in_rollout = True
            try:
                return timed(*args, **kwargs)
            finally:
                self._in_rollout = False
                self._take_weights_back()

        return rollout

    def _seeded(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        """`generate` with rollouts that are a function of the run's seed and the place in the run."""

        @functools.wraps(generate)
        def seeded(*args: Any, **kwargs: Any) -> Any:
            step, training = self.state.global_step, self.model.training
            call = self._rollouts_at[2] if self._rollouts_at[:2] == (step, training) else 0
            self._rollouts_at = (step, training, call + 1)
            with self._draws(step=step, call=call, training=training):
                return generate(*args, **kwargs)

        return seeded

    @property
    def _shares_weights(self) -> bool:
        return getattr(self.args, "vllm_share_weights", False)

    def _take_weights_back(self) -> None:
        """A policy that shares its storage with the engine has its own weights again, after rollouts."""
        if self._shares_weights:
            self.weight_sync.engine.restore()
            self._last_loaded_step = -1  # the next rollout folds again

    def _draws(self, **place: Any) -> AbstractContextManager[None]:
        """What seeds the rollouts of one place in the run, here or at the server."""
        if self.vllm_generation.mode == "colocate":
            engine = self.accelerator.process_index // self.args.vllm_tensor_parallel_size
            return drawing_from(rollout_seed(self.args.seed, **place, engine=engine))
        if self._client and getattr(self.args, "vllm_server_seeded", False):
            return self._client.drawing_from(rollout_seed(self.args.seed, **place, engine=0))
        return nullcontext()

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train, from the newest whole checkpoint of `output_dir` where `resume_from_checkpoint` is True.

        A run whose checkpoint is at `max_steps` is loaded and trained no further.

        Raises:
            ValueError: where there is no whole checkpoint to resume from.
            CheckpointError: where a checkpoint cannot be written, or the next one could not be.
        """
        if self.args.should_save:
            checkpoint.clear_leftovers(Path(self.args.output_dir))
        self.accelerator.wait_for_everyone()
        if not resume_from_checkpoint:
            return super().train(None, *args, **kwargs)
        know_indexed_cpu()
        folder = checkpoint.whole(Path(self.args.output_dir), resume_from_checkpoint)
        self.args.eval_on_start = False  # that was where the run started
        state = TrainerState.load_from_json(str(folder / checkpoint.STATE))
        if not 0 < self.args.max_steps <= state.global_step:
            return super().train(str(folder), *args, **kwargs)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(f"{folder} is at max_steps={self.args.max_steps}: the run is finished")
        self._load_from_checkpoint(str(folder))  # Trainer.train would take one step more
        self.state = state
        return TrainOutput(state.global_step, float("nan"), {})

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        sampler = super()._get_train_sampler(*args, **kwargs)
        self.remove_callback(OrderOfEpoch)
        self.add_callback(OrderOfEpoch(sampler))
        return sampler

    def _get_output_dir(self, trial: Any) -> str:
        run_dir = super()._get_output_dir(trial)
        return os.path.join(run_dir, checkpoint.UNFINISHED) if self._saving else run_dir

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint aside and give it its name once it is whole; older ones are dropped after that."""
        run_dir = Path(self._get_output_dir(trial))
        final = run_dir / f"checkpoint-{self.state.global_step}"
        staged = run_dir / checkpoint.UNFINISHED / final.name
        self._saving = True
        try:
            with failing_together():
                refuse_non_finite_weights(self.accelerator.unwrap_model(self.model), self.state.global_step)
                super()._save_checkpoint(model, trial)
                torch.save(progress_of(self), staged / progress_file(self))
            with failing_together():
                size = self._publish_checkpoint(staged, final) if self.args.should_save else 0
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(staged, ignore_errors=True)
            raise checkpoint.CheckpointError(
                f"the checkpoint of step {self.state.global_step} could not be written to {str(run_dir)!r}: "
                f"{checkpoint.cause_and_mend(error, run_dir)}"
            ) from error
        finally:
            self._saving = False
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        with failing_together():
            if self.args.should_save and self.state.global_step < self.state.max_steps:
                checkpoint.check_room(run_dir, size, f"stopped after saving {final.name}, so nothing is lost")

    def _publish_checkpoint(self, staged: Path, final: Path) -> int:
        """Complete, seal and name a checkpoint that all processes have written; its bytes."""
        best = self.state.best_model_checkpoint
        if best is not None and Path(best) == staged:  # transformers spells the path as `output_dir` does
            self.state.best_model_checkpoint = str(final)
            self.state.save_to_json(str(staged / checkpoint.STATE))
        for write in self.checkpoint_writers:
            write(staged)
        size = checkpoint.seal(staged)
        checkpoint.publish(staged, final)
        checkpoint.rotate(final.parent, self.args.save_total_limit, self.state.best_model_checkpoint)
        shutil.rmtree(staged.parent, ignore_errors=True)
        return size

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._saving:  # one that has its name, since the upload goes on in the background
            super()._push_from_checkpoint(checkpoint_folder)

    def _load_rng_state(self, folder: str | None) -> None:
        super()._load_rng_state(folder)
        if folder is not None:
            restore_progress(self, Path(folder))

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """pass@k of `held_out` on the live engine, freshly synced; TRL's own evaluation where there is none.

        Training goes on as if nothing had happened: random states, the engine's cache, what TRL has gathered for the
        next log entry, and a sleeping engine's sleep are as they were.
        """
        if self.held_out is None:
            return super().evaluate(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        with self.synced_sampler() as llm:
            scores = self._timed("evaluation", self._score_held_out)(llm)
        metrics = {f"{metric_key_prefix}_{measure}": value for measure, value in scores.items()}
        super(GRPOTrainer, self).log(metrics)  # TRL's own would pour its half-gathered training metrics in
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _score_held_out(self, llm: Any) -> dict[str, float]:
        """The same figures in every process, from the one that has an engine."""
        generation = self.vllm_generation
        scores = [None if llm is None else self.held_out.score(llm)]
        if llm is not None:
            llm.reset_prefix_cache()
        if generation.mode == "colocate" and generation.enable_sleep_mode:
            generation.llm.sleep(level=2)
            generation._llm_weights_sleeping = True
            self._last_loaded_step = -1  # sleep discards the weights: the next rollout syncs again
        broadcast_object_list(scores, from_process=0)
        return scores[0]

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with out_of_memory_in("training step"):
            return super().training_step(*args, **kwargs)

    def end(self) -> None:
        """Close what several processes share, in order: an engine in this process still wants the process group, and a
        group that is left open aborts some processes at their exit."""
        if self.use_vllm and self.vllm_generation.mode == "colocate":
            self.vllm_generation.llm.llm_engine.engine_core.shutdown()
        self.accelerator.end_training()

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluation always starts from a fresh sync: weights may have moved without a step (best model loaded)."""
        self._last_loaded_step = -1
        return super().evaluation_loop(*args, **kwargs)


def probe_token_ids(dataset: Iterable[dict[str, Any]], processing_class: Any) -> list[int]:
    """The first tokens of the first training prompt: text of the run's own kind, the same at every sync.  Where
    environments make the prompts, what TRL begins them with."""
    prompt = next(iter(dataset)).get("prompt", [{"role": "user", "content": ""}])
    return encode_prompts([prompt], processing_class)[0][:PROBE_TOKENS]


@contextmanager
def trl_builds_with(**factories: Callable[..., Any]) -> Iterator[None]:
    """Let TRL build its engine or its client through ours: it passes vLLM neither dtype nor revision nor
    enforce_eager, and its client synchronises weights over NCCL only."""
    originals = {name: getattr(trl_vllm, name, None) for name in factories}
    for name, factory in factories.items():
        setattr(trl_vllm, name, factory)
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(trl_vllm, name, original)


def take_over(trainer: GRPOTrainer) -> Any:
    """TRL's generation object, after a look at every private name this file relies on.

    Raises:
        RuntimeError: where this TRL is laid out otherwise than the version read.
    """
    import trl

    generation = getattr(trainer, "vllm_generation", None)
    used = (
        "_last_loaded_step", "_metrics", "_logs", "_step", "_buffered_inputs", "_generate_and_score_completions",
        "_generate_single_turn", "_tool_call_loop", "_tokenizer",
    )  # fmt: skip
    missing = [f"GRPOTrainer.{n}" for n in used if n not in vars(trainer) and not hasattr(GRPOTrainer, n)]
    missing += [
        f"VLLMGeneration.{name}"
        for name in ("sync_weights", "generate", "enable_sleep_mode", "mode")
        if not hasattr(generation, name)
    ]
    if getattr(generation, "mode", None) == "colocate":
        missing += [f"VLLMGeneration.{n}" for n in ("llm", "_llm_weights_sleeping") if not hasattr(generation, n)]
    if missing:
        raise RuntimeError(
            f"TRL {trl.__version__} lacks {', '.join(missing)}. fura_rl reads TRL {TRL_VERSIONS_READ}: install that "
            "version, or bring fura_rl/trainer.py up to the new layout"
        )
    return generation


def progress_file(trainer: GRPOTrainer) -> str:
    return f"grpo_state_{trainer.args.process_index}.pt"


def progress_of(trainer: FuraGRPOTrainer) -> dict[str, Any]:
    """What transformers' checkpoint lacks of a process's place in a run, as tensors and plain values.

    The rollouts that are still to be trained on, where a checkpoint falls between two generations; what has been
    gathered since the last log; and the version of the engine's weights, which seeds their stochastic rounding.
    """
    between = trainer._step % (trainer.args.steps_per_generation * trainer.num_iterations) != 0
    synced = trainer.use_vllm and trainer._last_loaded_step == trainer.state.global_step  # resuming syncs it once more
    logs = {name: queues for name, queues in trainer._logs.items() if name != "images"}
    return {
        "processes": trainer.accelerator.num_processes,
        "micro_step": trainer._step,
        "buffered_inputs": trainer._buffered_inputs if between else None,
        "sync_version": trainer.weight_sync.version - synced if trainer.use_vllm else 0,
        "loss": float(trainer._tr_loss),
        "total_loss": float(trainer._total_loss_scalar),
        "last_logged_step": trainer._globalstep_last_logged,
        "metrics": json.dumps(trainer._metrics["train"], default=float),
        "logs": json.dumps(logs, default=lambda value: list(value) if isinstance(value, deque) else str(value)),
    }


def restore_progress(trainer: FuraGRPOTrainer, folder: Path) -> None:
    """Put a process where `progress_of` has found it."""
    file = folder / progress_file(trainer)
    state = torch.load(file, map_location=trainer.accelerator.device, weights_only=True) if file.is_file() else None
    if state is None or state["processes"] != trainer.accelerator.num_processes:
        logger.warning(
            "%s was not saved by FuraGRPOTrainer in as many processes: the run goes on from its weights and optimizer, "
            "but not exactly as it would have gone on uninterrupted",
            folder,
        )
        return
    if trainer.args.sync_ref_model:
        logger.warning("sync_ref_model: the reference model is in no checkpoint and starts again from its base")
    trainer._step, trainer._buffered_inputs = state["micro_step"], state["buffered_inputs"]
    trainer._tr_loss.fill_(state["loss"])
    trainer._total_loss_scalar, trainer._globalstep_last_logged = state["total_loss"], state["last_logged_step"]
    trainer._metrics["train"].clear()
    trainer._metrics["train"].update(json.loads(state["metrics"]))
    for name, values in json.loads(state["logs"]).items():
        queues = {None: values} if isinstance(values, list) else values
        for column, items in queues.items():
            (trainer._logs[name] if column is None else trainer._logs[name][column]).extend(items)
    if trainer.use_vllm:
        trainer.weight_sync.version = state["sync_version"]
        trainer.weight_sync.prove_next()
        trainer._last_loaded_step = -1


def know_indexed_cpu() -> None:
    """Let `torch.load` map to "cpu:0": accelerate 1.15 calls the device of one of several processes on CPU so, and
    transformers loads the optimizer's state there."""
    torch.serialization.register_package(
        15, lambda storage: None, lambda storage, place: storage if place.startswith("cpu:") else None
    )


class OrderOfEpoch(TrainerCallback):
    """Prompts in the order of the epoch, also where a resumed run starts with it.

    TRL's sampler draws the order of an epoch with the generator as the epoch before has left it.
    """

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.sampler.shuffle:
            self.sampler.generator.manual_seed(self.sampler.seed)
            for _ in range(int(state.epoch or 0)):
                torch.randperm(self.sampler.num_samples, generator=self.sampler.generator)


def keep_core_dtype(policy: nn.Module) -> None:
    """Undo for FuRA what TRL does to a quantized policy: trained tensors in bfloat16, which swallows small steps."""
    for name, config in getattr(policy, "peft_config", {}).items():
        if isinstance(config, FuraConfig):
            restore_core_dtype(policy, name, config.core_dtype or "float32")
