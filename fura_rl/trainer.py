"""`FuraGRPOTrainer`: TRL's GRPOTrainer with our weight sync in place of its merge, push and unmerge.

The only file that touches TRL's private names.  Read in TRL 1.16; `take_over` looks for each of them, so that an
upgrade that moves one ends with a message.  Everything else of TRL's trainer is used as it is.
"""

from __future__ import annotations

import functools
import os
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import trl.generation.vllm_generation as trl_vllm
from accelerate.utils import broadcast_object_list
from peft import PeftConfig
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import GRPOConfig, GRPOTrainer

from fura_rl.adapters.fura_config import FuraConfig
from fura_rl.adapters.fura_tuner import restore_core_dtype
from fura_rl.alarms import Alarms, AlarmSettings, importance_cut_frac, refuse_non_finite_rollouts
from fura_rl.data import encode_prompts
from fura_rl.memory import out_of_memory_in
from fura_rl.rollout_client import TRANSPORTS, RolloutClient, ServerSampler, client_factory
from fura_rl.sync import probe
from fura_rl.sync.engine import RolloutEngine
from fura_rl.sync.remote_engine import Follower
from fura_rl.sync.rounding import ROUNDINGS
from fura_rl.sync.sharding import failing_together
from fura_rl.sync.vllm_engine import InProcessEngine, cpu_cache_settings
from fura_rl.sync.weight_sync import SYNC_MODES, SyncReport, WeightSync

TRL_VERSIONS_READ = "1.16"
PROBE_TOKENS = 64


class FuraGRPOTrainer(GRPOTrainer):
    """GRPO on a vLLM engine that provably serves the policy being trained.

    Takes TRL's arguments unchanged; `peft_config` is any PEFT config, or None for full fine-tuning, and `args` a
    `GRPOConfig` or `FuraGRPOConfig`.  Logs `sync/*` at every sync and `alarms/*` with every line, and keeps
    `phase_seconds`, the wall time of the rollout, reward and sync phases.

    Raises:
        ValueError: for settings that this trainer cannot serve, before a model is loaded.
        StaleEngineError: where an engine does not hold the policy's weights after a sync.
    """

    _tag_names: ClassVar[list[str]] = ["trl", "grpo", "fura"]

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        peft_config: PeftConfig | None = None,
        **kwargs: Any,
    ) -> None:
        check_settings(args, peft_config)
        self.phase_seconds: dict[str, float] = defaultdict(float)
        self.sync_reports: list[SyncReport] = []
        rewards = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        timed = [self._timed("reward", reward) if callable(reward) else reward for reward in rewards if reward]
        self._client: RolloutClient | None = None
        transport = getattr(args, "sync_transport", "auto")
        client = client_factory(transport, keep=lambda client: setattr(self, "_client", client))
        with trl_builds_with(LLM=self._make_engine, VLLMClient=client):
            super().__init__(model, timed, args, peft_config=peft_config, **kwargs)
        keep_core_dtype(self.accelerator.unwrap_model(self.model))
        self.alarms = Alarms(self.args if isinstance(self.args, AlarmSettings) else AlarmSettings())
        self.callback_handler.callbacks.insert(0, self.alarms)  # before the reporters, which shall see its counters
        if self.use_vllm:
            self._take_over_sync()

    def _make_engine(self, **kwargs: Any) -> Any:
        """vLLM's `LLM` with TRL's arguments and those TRL has no setting for."""
        from vllm import LLM

        enforce_eager = getattr(self.args, "vllm_enforce_eager", None)
        kwargs["dtype"] = getattr(self.args, "vllm_dtype", None) or str(self.compute_dtype).removeprefix("torch.")
        on_cpu = self.accelerator.device.type == "cpu"
        kwargs["enforce_eager"] = on_cpu if enforce_eager is None else enforce_eager
        if on_cpu:
            kwargs |= cpu_cache_settings(kwargs["gpu_memory_utilization"])
        kwargs["quantization"] = None  # a quantized policy is served folded, in 16 bits: never quantized a second time
        kwargs["revision"] = (self.args.model_init_kwargs or {}).get("revision")
        kwargs["seed"] += self.args.seed  # TRL seeds every run's engine alike, so seeds would share their rollouts
        kwargs["disable_log_stats"] = True
        kwargs["load_format"] = "safetensors"  # vLLM would take pickled weights where there are no others
        return LLM(**kwargs)

    @property
    def compute_dtype(self) -> torch.dtype:
        """What the policy's forward runs in: the autocast dtype, or that of its parameters."""
        mixed = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision)
        return mixed or self.accelerator.unwrap_model(self.model).dtype

    def _take_over_sync(self) -> None:
        generation = take_over(self)
        policy = self.accelerator.unwrap_model(self.model)
        self.weight_sync = WeightSync(
            policy,
            self._rollout_engine(generation),
            self._probe_token_ids(),
            mode=getattr(self.args, "sync_mode", "auto"),
            probe_every=getattr(self.args, "sync_probe_every", 10),
            probe_tolerance=getattr(self.args, "sync_probe_tolerance", None),
            audit_every=getattr(self.args, "sync_audit_every", 1),
            rounding=getattr(self.args, "fold_rounding", "nearest"),
            seed=self.args.seed,
            compute_dtype=self.compute_dtype,
            score=self._score,
        )
        generation.sync_weights = self.sync_weights
        generation.generate = self._timed("rollout", out_of_memory_in("rollouts")(generation.generate))

    def _rollout_engine(self, generation: Any) -> RolloutEngine:
        """The engine as this process sees it: in this process, behind a server, or as another process's business."""
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

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's batch, after a look at what TRL passes over: rollout log-probs that are not finite, and how many
        importance-sampling ratios were masked or clipped."""
        batch = super()._generate_and_score_completions(inputs)
        mask = batch["completion_mask"] * batch.get("tool_mask", 1)
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

    def _probe_token_ids(self) -> list[int]:
        """The first tokens of the first training prompt: text of the run's own kind, the same at every sync."""
        prompt = next(iter(self.train_dataset))["prompt"]
        return encode_prompts([prompt], self.processing_class)[0][:PROBE_TOKENS]

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

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with out_of_memory_in("training step"):
            return super().training_step(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluation always starts from a fresh sync: weights may have moved without a step (best model loaded)."""
        self._last_loaded_step = -1
        return super().evaluation_loop(*args, **kwargs)


def check_settings(args: GRPOConfig | None, peft_config: PeftConfig | None) -> None:
    """Refuse, before anything is loaded, what the sync cannot do.

    Raises:
        ValueError: with every fault at once.
    """
    faults = [] if args is None else sharding_faults(args, peft_config)
    if (transport := getattr(args, "sync_transport", "auto")) not in TRANSPORTS:
        faults.append(f"sync_transport={transport!r} must be one of {', '.join(TRANSPORTS)}")
    if (mode := getattr(args, "sync_mode", "auto")) not in SYNC_MODES:
        faults.append(f"sync_mode={mode!r} must be one of {', '.join(SYNC_MODES)}")
    if set(getattr(peft_config, "modules_to_save", None) or ()) & {"embed_tokens", "lm_head"}:
        faults.append(
            "modules_to_save with embed_tokens or lm_head drifts from the engine where the two are tied; leave them out"
        )
    if getattr(args, "sync_probe_every", 1) < 1:
        faults.append(f"sync_probe_every={args.sync_probe_every} must be at least 1")
    if getattr(args, "sync_audit_every", 1) < 0:
        faults.append(f"sync_audit_every={args.sync_audit_every} must be 0 (never) or more")
    if (rounding := getattr(args, "fold_rounding", "nearest")) not in ROUNDINGS:
        faults.append(f"fold_rounding={rounding!r} must be one of {', '.join(ROUNDINGS)}")
    if faults:
        raise ValueError("; ".join(faults))


def sharding_faults(args: GRPOConfig, peft_config: PeftConfig | None) -> list[str]:
    """What is wrong with how the launcher or `args` shard the policy.

    Read from accelerate's environment variables: its state names a kind of sharding only once a trainer is made.
    """
    plugin = args.fsdp_plugin_args
    fsdp = bool(plugin) or is_set("ACCELERATE_USE_FSDP")
    zero = bool(args.deepspeed) or is_set("ACCELERATE_USE_DEEPSPEED")
    faults = []
    if (fsdp or zero) and args.use_vllm and args.vllm_mode == "colocate":
        faults.append(
            f"{'FSDP' if fsdp else 'DeepSpeed'} shards the policy, and vllm_mode='colocate' folds from whole base "
            "weights: use vllm_mode='server', where the engine reads its own, or DDP"
        )
    version = (plugin or {}).get("fsdp_version", os.environ.get("FSDP_VERSION", "1"))
    if fsdp and str(version) != "2":
        faults.append(f"fsdp_version={version} flattens parameters, which the weight sync cannot read: use 2")
    if zero and isinstance(peft_config, FuraConfig) and zero_stage(args) == 3:
        faults.append(
            "zero_stage=3 loads the base weights already cut up, and each FuRA adapter is made of a whole one: use "
            "configs/accelerate/fsdp2.yaml, or zero2.yaml"
        )
    if fsdp and isinstance(peft_config, FuraConfig) and is_set("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        faults.append(
            "fsdp_cpu_ram_efficient_loading=true leaves all processes but one without base weights, of which each "
            "FuRA adapter is made: set it to false"
        )
    return faults


def zero_stage(args: GRPOConfig) -> int | None:
    """DeepSpeed's stage, from the arguments or from what `accelerate launch` was told; None where it is in a file."""
    if isinstance(args.deepspeed, dict):
        return args.deepspeed.get("zero_optimization", {}).get("stage")
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "")
    return int(stage) if stage.isdigit() else None


def is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1", "yes")


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
    used = ("_last_loaded_step", "_metrics", "_generate_and_score_completions")
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


def keep_core_dtype(policy: nn.Module) -> None:
    """Undo for FuRA what TRL does to a quantized policy: trained tensors in bfloat16, which swallows small steps."""
    for name, config in getattr(policy, "peft_config", {}).items():
        if isinstance(config, FuraConfig):
            restore_core_dtype(policy, name, config.core_dtype or "float32")


class SaveOnInterrupt(TrainerCallback):
    """Ctrl-C or SIGTERM ends the run after the step in progress, with a checkpoint; a second Ctrl-C ends it at once.

    A SIGTERM after a Ctrl-C is no second request: `accelerate launch` dies of the first and takes its child along.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        if self.received == number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received is None:
            self.received = number
            name = signal.Signals(number).name
            print(f"\n{name}: finishing this step, then saving a checkpoint; Ctrl-C once more to stop now", flush=True)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.received is not None:
            control.should_save = control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
