"""Alarms for runs that go wrong without an error: one pure function each, over the lines that the trainer logs.

An alarm is on where its condition holds in each of the latest `alarm_patience` log lines.  It warns once when it goes
on, with step, value, threshold and the mend, and again only after it was off.  `alarms/<name>` in every log line counts
the warnings so far, `alarms/on` the alarms that are on.  Numbers that are not finite stop the run at once instead,
before they reach a weight.  `Alarms` works in any TRL trainer; `FuraGRPOTrainer` brings it.
"""

from __future__ import annotations

import logging
import math
import operator
import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fura_rl.finite import all_finite
from fura_rl.sync.sharding import failing_together, local

logger = logging.getLogger(__name__)

Line = Mapping[str, Any]  # one logged line: name -> number, None where TRL had nothing to average
NOISE_NATS = 1e-3  # a train/rollout gap below this is rounding, whatever it grew from
ALMOST_SURE_NATS = 1e-2  # a policy that starts with less entropy a token has none to lose
UNREADABLE = ("no_answer_frac", "truncated_frac", "unparseable_frac")  # statuses of rewards/result.py


@dataclass
class AlarmSettings:
    """Thresholds, as fields of the trainer's arguments."""

    alarm_patience: int = field(
        default=10, metadata={"help": "Log lines in a row that must show a fault before its alarm warns; 0: no alarms."}
    )
    alarm_reward_spread: float = field(
        default=0.0, metadata={"help": "Warn where the mean reward of those lines differs by no more than this."}
    )
    alarm_equal_groups_frac: float = field(
        default=1.0, metadata={"help": "Warn where this share of groups or more has all-equal rewards."}
    )
    alarm_unreadable_frac: float = field(
        default=1.0, metadata={"help": "Warn where this share of completions or more has no answer that can be read."}
    )
    alarm_truncated_frac: float = field(
        default=1.0, metadata={"help": "Warn where this share of completions or more is cut at max_completion_length."}
    )
    alarm_importance_cut_frac: float = field(
        default=0.1,
        metadata={"help": "Warn where importance sampling masks or clips more than this share of its ratios."},
    )
    alarm_gap_growth: float = field(
        default=10.0,
        metadata={"help": "Warn where the train/rollout log-prob gap is over this many times that of the first lines."},
    )
    alarm_entropy_frac: float = field(
        default=0.05, metadata={"help": "Warn where the entropy is below this share of that of the first lines."}
    )
    alarm_kl: float = field(
        default=1.0, metadata={"help": "Warn where the KL from the reference policy exceeds this, in nats a token."}
    )
    alarm_grad_norm: float = field(
        default=0.0, metadata={"help": "Warn where the gradient norm is no more than this though groups differ."}
    )
    alarm_update_cosine: float = field(
        default=0.1, metadata={"help": "Warn where sync/update_cosine is below this: rounding swallows the update."}
    )


@dataclass(frozen=True)
class Reading:
    """What an alarm saw: it is on."""

    value: float
    threshold: float


@dataclass(frozen=True)
class Seen:
    """Training lines of a run, oldest first: the first ones, which growth is measured from, and the latest."""

    first: Sequence[Line]
    latest: Sequence[Line]  # as many as the patience, fewer at the start


def lasting(seen: Seen, settings: AlarmSettings, name: str) -> list[float]:
    """The values of one metric in the latest lines; empty until all of them have it."""
    values = [line.get(name) for line in seen.latest]
    whole = len(values) == settings.alarm_patience and all(value is not None for value in values)
    return [float(value) for value in values] if whole else []


def mean_at_first(seen: Seen, name: str) -> float | None:
    values = [float(line[name]) for line in seen.first if line.get(name) is not None]
    return statistics.fmean(values) if values else None


def reward_constant(seen: Seen, settings: AlarmSettings) -> Reading | None:
    rewards = lasting(seen, settings, "reward")
    if len(rewards) > 1 and max(rewards) - min(rewards) <= settings.alarm_reward_spread:
        return Reading(max(rewards) - min(rewards), settings.alarm_reward_spread)
    return None


def beyond(
    name: str, threshold: str, holds: Callable[[float, float], bool] = operator.gt
) -> Callable[[Seen, AlarmSettings], Reading | None]:
    """On where a metric is above its threshold (or otherwise `holds` against it) in every latest line."""

    def check(seen: Seen, settings: AlarmSettings) -> Reading | None:
        limit = getattr(settings, threshold)
        values = lasting(seen, settings, name)
        return Reading(values[-1], limit) if values and holds(min(values), limit) else None

    return check


def answers_unreadable(seen: Seen, settings: AlarmSettings) -> Reading | None:
    """The verifier's statuses, summed for each reward that logs them; on where one reward reads nothing."""
    rewards = {name.rpartition("/")[0] for line in seen.latest for name in line if name.endswith(UNREADABLE)}
    for reward in sorted(rewards):
        shares = [lasting(seen, settings, f"{reward}/{status}") for status in UNREADABLE]
        sums = [sum(share) for share in zip(*filter(None, shares), strict=True)]
        if sums and min(sums) >= settings.alarm_unreadable_frac - 1e-6:  # sums of float32 means
            return Reading(sums[-1], settings.alarm_unreadable_frac)
    return None


def rollout_gap_grows(seen: Seen, settings: AlarmSettings) -> Reading | None:
    name = "sampling/sampling_logp_difference/mean"
    start, gaps = mean_at_first(seen, name), lasting(seen, settings, name)
    if start is None or not gaps:
        return None
    limit = max(settings.alarm_gap_growth * start, NOISE_NATS)
    return Reading(gaps[-1], limit) if min(gaps) > limit else None


def entropy_collapses(seen: Seen, settings: AlarmSettings) -> Reading | None:
    start, entropies = mean_at_first(seen, "entropy"), lasting(seen, settings, "entropy")
    if start is None or start < ALMOST_SURE_NATS or not entropies:
        return None
    limit = settings.alarm_entropy_frac * start
    return Reading(entropies[-1], limit) if max(entropies) < limit else None


def adapter_frozen(seen: Seen, settings: AlarmSettings) -> Reading | None:
    """No gradient although rewards differ within a group: equal groups have none, and an alarm of their own."""
    norms = lasting(seen, settings, "grad_norm")
    equal = lasting(seen, settings, "frac_reward_zero_std")
    if norms and equal and max(norms) <= settings.alarm_grad_norm and max(equal) < 1:
        return Reading(norms[-1], settings.alarm_grad_norm)
    return None


def update_lost(seen: Seen, settings: AlarmSettings) -> Reading | None:
    cosines = lasting(seen, settings, "sync/update_cosine")
    if cosines and max(cosines) < settings.alarm_update_cosine:
        return Reading(cosines[-1], settings.alarm_update_cosine)
    return None


# Why an alarm can see nothing under the arguments of a trainer, which may be any of TRL's; None where it can.


def one_line(args: Any) -> str | None:
    return "needs alarm_patience above 1" if getattr(args, "alarm_patience", None) == 1 else None


def without_sync(args: Any) -> str | None:
    return None if getattr(args, "use_vllm", True) else "needs use_vllm"  # TRL's asynchronous trainer has no other way


def without_correction(args: Any) -> str | None:
    corrected = getattr(args, "vllm_importance_sampling_correction", False)
    return without_sync(args) or (None if corrected else "needs vllm_importance_sampling_correction")


def without_reference(args: Any) -> str | None:
    return None if getattr(args, "beta", 0) else "needs beta above 0"


@dataclass(frozen=True)
class Alarm:
    """One row of the table."""

    measures: str  # what value and threshold are of
    check: Callable[[Seen, AlarmSettings], Reading | None]
    mend: str
    blind: Callable[[Any], str | None] = lambda args: None


ALARMS = {
    "reward_constant": Alarm(
        "spread of the mean reward", reward_constant,
        "nothing is left to learn, or the reward sees no difference: read completions (--log_completions), try harder "
        "or easier problems",
        one_line,
    ),
    "groups_equal": Alarm(
        "frac_reward_zero_std", beyond("frac_reward_zero_std", "alarm_equal_groups_frac", operator.ge),
        "no group has an advantage, so nothing is learned: use problems that are solved sometimes, more "
        "num_generations, or a higher temperature",
    ),
    "answers_unreadable": Alarm(
        "share of completions without a readable answer", answers_unreadable,
        "make prompt_template ask for the format that the reward reads, and look whether completions are truncated",
    ),
    "completions_truncated": Alarm(
        "completions/clipped_ratio", beyond("completions/clipped_ratio", "alarm_truncated_frac", operator.ge),
        "raise max_completion_length (and vllm_max_model_length), and check that the chat template ends a turn",
    ),
    "importance_cut": Alarm(
        "sampling/importance_sampling_ratio/cut_frac",
        beyond("sampling/importance_sampling_ratio/cut_frac", "alarm_importance_cut_frac"),
        "the engine samples from another policy than the one trained: compare vllm_dtype with the policy's dtype; for "
        "long completions use vllm_importance_sampling_mode=token_truncate",
        without_correction,
    ),
    "rollout_gap_grows": Alarm(
        "sampling/sampling_logp_difference/mean in nats", rollout_gap_grows,
        "engine and trainer drift apart: look at sync/probe_max_gap, set sync_probe_every=1, or serve in float32",
        without_correction,
    ),
    "entropy_collapses": Alarm(
        "entropy in nats", entropy_collapses,
        "samples of a group become the same: lower learning_rate, or raise temperature or beta",
    ),
    "kl_blows_up": Alarm(
        "kl in nats a token", beyond("kl", "alarm_kl"),
        "the policy has left its reference: lower learning_rate, raise beta, or go back to an earlier checkpoint",
        without_reference,
    ),
    "adapter_frozen": Alarm(
        "grad_norm", adapter_frozen,
        "no gradient reaches a trained tensor: check adapter_target_modules and what requires_grad",
    ),
    "update_lost": Alarm(
        "sync/update_cosine", update_lost,
        "rounding to the engine's dtype swallows the update: use fold_rounding=stochastic, vllm_dtype=float32, or a "
        "higher learning_rate",
        without_sync,
    ),
}  # fmt: skip


def raised(seen: Seen, settings: AlarmSettings) -> dict[str, Reading]:
    """The alarms that are on, by name."""
    if settings.alarm_patience == 0:
        return {}
    readings = {name: alarm.check(seen, settings) for name, alarm in ALARMS.items()}
    return {name: reading for name, reading in readings.items() if reading is not None}


def blind(settings: AlarmSettings, args: Any) -> dict[str, str]:
    """The alarms that are enabled and cannot see anything under the arguments of a trainer: name -> why."""
    if settings.alarm_patience == 0:
        return {}
    reasons = {name: alarm.blind(args) for name, alarm in ALARMS.items()}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def message(name: str, reading: Reading, step: int, patience: int) -> str:
    alarm = ALARMS[name]
    return (
        f"alarm {name} at step {step}: {alarm.measures} is {reading.value:.4g} (threshold {reading.threshold:.4g}) "
        f"and has been beyond it for {patience} log lines; {alarm.mend}"
    )


def non_finite(line: Line, names: Sequence[str]) -> list[str]:
    """Those of `names` whose value in `line` is NaN or infinite."""
    return [name for name in names if line.get(name) is not None and not math.isfinite(line[name])]


def non_finite_gradients(model: nn.Module) -> tuple[int, int]:
    """How many trained tensors have a gradient that is not finite, of how many that have one; one wait for a GPU."""
    return non_finite_tensors([local(p.grad) for p in model.parameters() if p.requires_grad and p.grad is not None])


def non_finite_tensors(tensors: Sequence[torch.Tensor]) -> tuple[int, int]:
    """How many of them are not finite, of how many."""
    if all_finite(tensors):
        return 0, len(tensors)
    finite = torch.stack([torch.isfinite(tensor).all() for tensor in tensors])
    return len(tensors) - int(finite.sum()), len(tensors)


def refuse_non_finite_weights(model: nn.Module, step: int) -> None:
    """A look at the trained weights before they are saved: DeepSpeed keeps gradients where no callback sees them.

    Raises:
        FloatingPointError: where one of them is not finite.
    """
    bad, total = non_finite_tensors([local(p) for p in model.parameters() if p.requires_grad])
    if bad:
        raise FloatingPointError(not_finite_message(f"{bad} of {total} trained tensors are not finite", step))


def refuse_non_finite_rollouts(logprobs: torch.Tensor, mask: torch.Tensor) -> None:
    """`logprobs` and `mask` (B, T): log-probs that tokens were sampled with, and which of them are trained on.

    TRL would take such a token for one that needs no correction.

    Raises:
        FloatingPointError: where one of them is not finite.
    """
    bad = int((~torch.isfinite(logprobs) & mask.bool()).sum())
    if bad:
        raise FloatingPointError(
            f"{bad} of {int(mask.sum())} sampled tokens have a rollout log-prob that is not finite, so the engine "
            "computes with NaN or infinite numbers: serve with vllm_dtype=bfloat16 or float32, and if that is so "
            "already, go back to an earlier checkpoint"
        )


def importance_cut_frac(ratios: torch.Tensor, mask: torch.Tensor, low: float | None, high: float | None) -> float:
    """The share of importance-sampling ratios that TRL masked (to 0) or clipped (to a bound).

    Args:
        ratios: (B, T) of tokens or (B, 1) of sequences, as they enter the loss.
        mask: (B, T), the tokens that are trained on.
    """
    kept = ratios[mask.bool()] if ratios.shape == mask.shape else ratios.flatten()
    cut = kept == 0
    for bound in (low, high):
        if bound is not None:
            cut |= kept == bound
    return cut.float().mean().item() if kept.numel() else 0.0


class Alarms(TrainerCallback):
    """Watches the log lines of a trainer.  Put it before the reporters, so that they see its counters."""

    def __init__(self, settings: AlarmSettings) -> None:
        self.settings = settings
        self._forget()

    def _forget(self) -> None:
        self.counts = dict.fromkeys(ALARMS, 0)
        self.on: dict[str, Reading] = {}
        self._first: list[Line] = []
        self._latest: deque[Line] = deque(maxlen=max(1, self.settings.alarm_patience))

    def note(self, line: Line) -> dict[str, Reading]:
        """Takes in one training line.  Returns the alarms that went on with it."""
        if len(self._first) < self.settings.alarm_patience:
            self._first.append(line)
        self._latest.append(line)
        now = raised(Seen(self._first, self._latest), self.settings)
        new = {name: reading for name, reading in now.items() if name not in self.on}
        for name in new:
            self.counts[name] += 1
        self.on = now
        return new

    def metrics(self) -> dict[str, float]:
        return {"alarms/on": float(len(self.on)), **{f"alarms/{name}": float(n) for name, n in self.counts.items()}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A resumed run knows what its earlier part has shown; and no run is taken for watched where it is not."""
        if state.is_world_process_zero and (unseen := blind(self.settings, args)):
            shown = "; ".join(f"{name} ({reason})" for name, reason in unseen.items())
            logger.warning("alarms that these settings leave blind: %s", shown)
        self._forget()
        for line in state.log_history:
            if is_training_line(line):
                self.note(line)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict | None = None, **_: Any
    ) -> None:
        if logs is None or not is_training_line(logs):
            return
        # TRL makes the advantages of an infinite reward 0; a loss scaler skips a step whose gradient overflows
        if bad := non_finite(logs, ("loss", "reward") if args.fp16 else ("loss", "reward", "grad_norm")):
            shown = ", ".join(f"{name} is {logs[name]}" for name in bad)
            raise FloatingPointError(not_finite_message(shown, state.global_step))
        for name, reading in self.note(dict(logs)).items():
            if state.is_world_process_zero:
                logger.warning(message(name, reading, state.global_step, self.settings.alarm_patience))
        logs.update(self.metrics())
        state.log_history[-1].update(self.metrics())

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Stops before a step that would write NaN into the weights, which no later step gets out again."""
        if args.fp16 or model is None:
            return
        with failing_together():
            bad, total = non_finite_gradients(model)
            if bad:
                shown = f"the gradient of {bad} of {total} trained tensors is not finite"
                raise FloatingPointError(not_finite_message(shown, state.global_step + 1))


def is_training_line(line: Line) -> bool:
    return "loss" in line


def not_finite_message(shown: str, step: int) -> str:
    return (
        f"{shown} at step {step}, so the run stops before it is saved; resume from the last checkpoint with a lower "
        "learning_rate or max_grad_norm, and check that every reward is finite and that the policy is not in float16"
    )
