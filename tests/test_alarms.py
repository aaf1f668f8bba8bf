"""Alarms for silent failures: each function on lines that must and must not raise it, and several in real runs."""

import json
import math
import re
import subprocess
import sys
from collections import deque
from types import SimpleNamespace

import pytest
import torch
from conftest import REPOSITORY
from preloaded import said
from rollout_server import child_environment
from torch import nn

from fura_rl import alarms
from fura_rl.alarms import ALARMS, Alarms, AlarmSettings, Reading, Seen, importance_cut_frac

SETTINGS = AlarmSettings(alarm_patience=3)
GAP, CUT = "sampling/sampling_logp_difference/mean", "sampling/importance_sampling_ratio/cut_frac"
CLIPPED = "completions/clipped_ratio"


def lines(**columns):
    """Lines of a log from its columns, in which "__" stands for the "/" of a metric's name."""
    count = max(len(values) for values in columns.values())
    return [{name.replace("__", "/"): values[i] for name, values in columns.items()} for i in range(count)]


def column(name, *values):
    return [{name: value} for value in values]


# alarm -> (a log that raises it, its reading, logs that do not)
CASES = {
    "reward_constant": (
        column("reward", 0.2, 0.5, 0.5, 0.5), Reading(0.0, 0.0),
        [column("reward", 0.5, 0.5), column("reward", 0.5, 0.5, 0.501), column("reward", 0.5, None, 0.5)],
    ),
    "groups_equal": (
        column("frac_reward_zero_std", 0.5, 1, 1, 1), Reading(1.0, 1.0), [column("frac_reward_zero_std", 1, 0.9, 1)]
    ),
    "answers_unreadable": (
        lines(r__no_answer_frac=[0.25] * 3, r__truncated_frac=[0.5] * 3, r__unparseable_frac=[0.25] * 3),
        Reading(1.0, 1.0),
        [
            lines(r__no_answer_frac=[0.5] * 3, r__unparseable_frac=[0.25] * 3),
            lines(r__no_answer_frac=[0.5] * 3, other__no_answer_frac=[0.5] * 3),
        ],
    ),
    "completions_truncated": (column(CLIPPED, 1, 1, 1), Reading(1.0, 1.0), [column(CLIPPED, 1, 1, 0.99)]),
    "importance_cut": (column(CUT, 0, 0.2, 0.3, 0.4), Reading(0.4, 0.1), [column(CUT, 0.2, 0.3, 0.1)]),
    "rollout_gap_grows": (
        column(GAP, 0.01, 0.02, 0.03, 0.3, 0.4, 0.5), Reading(0.5, pytest.approx(0.2)),
        [column(GAP, 0.01, 0.02, 0.03, 0.1, 0.3, 0.1), column(GAP, 1e-7, 1e-7, 1e-7, 1e-4, 1e-4, 1e-4)],
    ),
    "entropy_collapses": (
        column("entropy", 1.0, 1.0, 1.0, 0.04, 0.03, 0.02), Reading(0.02, 0.05),
        [
            column("entropy", 1.0, 1.0, 1.0, 0.06, 0.06, 0.04),
            column("entropy", 0.009, 0.009, 0.009, 0.0, 0.0, 0.0),
        ],
    ),
    "kl_blows_up": (column("kl", 0.1, 2, 3, 4), Reading(4.0, 1.0), [column("kl", 2, 3, 1)]),
    "adapter_frozen": (
        lines(grad_norm=[0.0] * 3, frac_reward_zero_std=[0.5] * 3), Reading(0.0, 0.0),
        [
            lines(grad_norm=[0.0] * 3, frac_reward_zero_std=[1.0] * 3),
            lines(grad_norm=[0, 1e-9, 0], frac_reward_zero_std=[0.5] * 3),
        ],
    ),
    "update_lost": (
        column("sync/update_cosine", 1.0, 0.05, 0.02, 0.0), Reading(0.0, 0.1),
        [column("sync/update_cosine", 0.05, 0.05, 0.15)],
    ),
}  # fmt: skip


def seen(log):
    return Seen(log[:3], deque(log, maxlen=3))


def test_every_alarm_has_a_case():
    assert CASES.keys() == ALARMS.keys()


@pytest.mark.parametrize("name", CASES)
def test_an_alarm_is_on_where_it_must_be(name):
    log, reading, quiet = CASES[name]
    assert alarms.raised(seen(log), SETTINGS) == {name: reading}
    for other in quiet:
        assert name not in alarms.raised(seen(other), SETTINGS), other
    assert alarms.raised(seen(log[:2]), SETTINGS) == {}, "two lines are not three"
    assert alarms.raised(seen(log), AlarmSettings(alarm_patience=0)) == {}


THRESHOLDS = {
    "reward_constant": ("alarm_reward_spread", -1.0),
    "groups_equal": ("alarm_equal_groups_frac", 1.1),
    "answers_unreadable": ("alarm_unreadable_frac", 1.1),
    "completions_truncated": ("alarm_truncated_frac", 1.1),
    "importance_cut": ("alarm_importance_cut_frac", 0.5),
    "rollout_gap_grows": ("alarm_gap_growth", 100.0),
    "entropy_collapses": ("alarm_entropy_frac", 0.01),
    "kl_blows_up": ("alarm_kl", 5.0),
    "adapter_frozen": ("alarm_grad_norm", -1.0),
    "update_lost": ("alarm_update_cosine", 0.0),
}


@pytest.mark.parametrize("name", CASES)
def test_every_threshold_is_a_setting(name):
    setting, value = THRESHOLDS[name]
    assert alarms.raised(seen(CASES[name][0]), AlarmSettings(alarm_patience=3, **{setting: value})) == {}


def test_an_alarm_warns_once_an_episode_and_is_counted():
    watch = Alarms(AlarmSettings(alarm_patience=2))
    new = [list(watch.note({CLIPPED: value})) for value in (1, 1, 1, 0, 1, 1, 1)]
    assert new == [[], ["completions_truncated"], [], [], [], ["completions_truncated"], []]
    assert watch.metrics()["alarms/completions_truncated"] == 2
    assert watch.metrics()["alarms/on"] == 1
    assert watch.metrics().keys() == {"alarms/on", *(f"alarms/{name}" for name in ALARMS)}


def trainer_log(watch, history, line, **args):
    """What transformers' Trainer.log does with a line."""
    state = SimpleNamespace(global_step=len(history) + 1, log_history=history, is_world_process_zero=True)
    history.append(dict(line))
    watch.on_log(SimpleNamespace(fp16=False, **args), state, None, logs=line)
    return line


def test_a_warning_names_step_value_threshold_and_mend(caplog):
    watch, history = Alarms(AlarmSettings(alarm_patience=2)), []
    for kl in (2.0, 3.5):
        line = trainer_log(watch, history, {"loss": 0.0, "kl": kl})
    [record] = caplog.records
    assert "alarm kl_blows_up at step 2: kl in nats a token is 3.5 (threshold 1)" in record.message
    assert "lower learning_rate" in record.message
    assert line["alarms/kl_blows_up"] == history[-1]["alarms/kl_blows_up"] == 1.0, "the reporters and the history"
    assert trainer_log(watch, history, {"eval_loss": 1.0}) == {"eval_loss": 1.0}


def test_a_resumed_run_knows_its_earlier_lines():
    watch, history = Alarms(AlarmSettings(alarm_patience=2)), []
    for kl in (2.0, 2.0, 0.0, 2.0):
        trainer_log(watch, history, {"loss": 0.0, "kl": kl})
    again = Alarms(AlarmSettings(alarm_patience=2))
    again.on_train_begin(None, SimpleNamespace(log_history=history, is_world_process_zero=False), None)
    assert again.metrics() == watch.metrics()
    assert list(again.note({"loss": 0.0, "kl": 2.0})) == ["kl_blows_up"]


def watching(args):
    return SimpleNamespace(**{"use_vllm": True, "vllm_importance_sampling_correction": True, "beta": 0.1} | args)


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ({}, {}),
        ({"beta": 0.0}, {"kl_blows_up": "needs beta above 0"}),
        (
            {"vllm_importance_sampling_correction": False},
            dict.fromkeys(("importance_cut", "rollout_gap_grows"), "needs vllm_importance_sampling_correction"),
        ),
        ({"use_vllm": False}, dict.fromkeys(("importance_cut", "rollout_gap_grows", "update_lost"), "needs use_vllm")),
        ({"beta": 0.0, "alarm_patience": 2}, {"kl_blows_up": "needs beta above 0"}),
        ({"alarm_patience": 1}, {"reward_constant": "needs alarm_patience above 1"}),
    ],
)
def test_an_alarm_that_can_see_nothing_says_so_as_training_starts(args, expected, caplog):
    state = SimpleNamespace(log_history=[], is_world_process_zero=True)
    Alarms(SETTINGS).on_train_begin(watching(args), state, None)
    shown = "; ".join(f"{name} ({reason})" for name, reason in expected.items())
    text = f"alarms that these settings leave blind: {shown}"
    assert [record.message for record in caplog.records] == ([text] if expected else [])
    Alarms(AlarmSettings(alarm_patience=0)).on_train_begin(watching(args), state, None)
    assert len(caplog.records) == bool(expected), "alarms that are off"


@pytest.mark.parametrize(
    "line", [{"loss": math.nan}, {"loss": 0.0, "grad_norm": math.inf}, {"loss": 0.0, "reward": math.inf}]
)
def test_a_number_that_is_not_finite_stops_the_run(line):
    with pytest.raises(FloatingPointError, match=r"is (nan|inf) at step 1, so the run stops .*learning_rate"):
        trainer_log(Alarms(SETTINGS), [], line)


def test_a_gradient_that_is_not_finite_stops_the_run_before_its_step():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model(torch.ones(1, 2)).sum().backward()
    watch, state = Alarms(SETTINGS), SimpleNamespace(global_step=6)
    watch.on_pre_optimizer_step(SimpleNamespace(fp16=False), state, None, model=model)
    model[1].bias.grad[0] = math.nan
    with pytest.raises(FloatingPointError, match="the gradient of 1 of 4 trained tensors is not finite at step 7"):
        watch.on_pre_optimizer_step(SimpleNamespace(fp16=False), state, None, model=model)
    watch.on_pre_optimizer_step(SimpleNamespace(fp16=True), state, None, model=model)  # its loss scaler skips the step


def test_a_rollout_logprob_that_is_not_finite_stops_the_run_where_it_is_trained_on():
    logprobs = torch.tensor([[-1.0, math.nan], [-2.0, -math.inf]])
    alarms.refuse_non_finite_rollouts(logprobs, torch.tensor([[1, 0], [1, 0]]))
    with pytest.raises(FloatingPointError, match=r"2 of 4 sampled tokens .*vllm_dtype"):
        alarms.refuse_non_finite_rollouts(logprobs, torch.ones(2, 2, dtype=torch.long))


def test_the_share_of_ratios_that_importance_sampling_cuts():
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    tokens = torch.tensor([[0.0, 3.0, 1.2], [0.5, 0.0, 0.0]])
    assert importance_cut_frac(tokens, mask, None, 3.0) == pytest.approx(2 / 4)
    assert importance_cut_frac(tokens, mask, 0.5, 3.0) == pytest.approx(3 / 4)
    assert importance_cut_frac(torch.tensor([[0.0], [0.7]]), mask, None, 3.0) == pytest.approx(1 / 2)
    assert importance_cut_frac(tokens, torch.zeros_like(mask), None, 3.0) == 0.0


def by_parity(completions, **_):
    """A reward that differs within a group; from the fourth step on so large that its gradient overflows."""
    by_parity.calls += 1
    scale = 1e37 if by_parity.calls > 3 else 1.0
    return [scale * (sum(map(ord, str(text))) % 2) for text in completions]


by_parity.calls = 0


def short(completions, **_):
    return [-len(str(text)) / 10 for text in completions]


def a_one(completions, **_):
    """What one token alone is paid for, the policy ends up sure of."""
    return [float("1" in str(text)) for text in completions]


RUN = [
    *("launch/grpo_math.py", "--eval_problems", "0", "--max_steps", "4", "--save_steps", "1"),
    *("--use_cpu", "true", "--per_device_train_batch_size", "16", "--alarm_patience", "2"),
    *("--alarm_entropy_frac", "0"),  # two steps of few prompts differ in entropy by themselves
]


def run(*options, code=0):
    return said(*RUN, *options, code=code, timeout=400)


def warned(text):
    return re.findall(r"alarm (\w+) at step (\d+)", text)


def history(folder, step):
    return json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())["log_history"]


@pytest.mark.slow
def test_a_run_whose_completions_are_all_cut_says_so(tmp_path):
    text = run("--max_completion_length", 2, "--output_dir", tmp_path)
    expected = ["reward_constant", "groups_equal", "answers_unreadable", "completions_truncated"]
    assert warned(text) == [(name, "2") for name in expected]
    last = [line for line in history(tmp_path, 4) if "loss" in line][-1]
    assert [name for name in ALARMS if last[f"alarms/{name}"] == 1] == expected
    assert last["alarms/on"] == 4


@pytest.mark.slow
def test_a_run_with_a_far_too_large_rate_says_what_it_does_to_the_policy(tmp_path):
    engine = ["--vllm_dtype", "bfloat16", "--vllm_importance_sampling_correction", "true", "--alarm_gap_growth", 1.2]
    rate = ["--learning_rate", 0.1, "--beta", 1e-3, "--max_steps", 12, "--warmup_steps", 8]
    text = run(*engine, *rate, "--reward_funcs", "test_alarms.short", "--output_dir", tmp_path)
    assert {"rollout_gap_grows", "kl_blows_up"} <= {name for name, _ in warned(text)}


@pytest.mark.slow
def test_a_run_that_is_paid_for_one_token_says_that_its_entropy_collapses(tmp_path):
    sampling = ["--max_completion_length", 1, "--temperature", 2, "--per_device_train_batch_size", 128]
    rate = ["--learning_rate", 0.02, "--max_steps", 12, "--alarm_entropy_frac", 0.5]
    text = run(*sampling, *rate, "--reward_funcs", "test_alarms.a_one", "--output_dir", tmp_path)
    entropies = [line["entropy"] for line in history(tmp_path, 12) if "loss" in line]
    assert entropies[-1] < 0.5 * entropies[0]
    assert "entropy_collapses" in {name for name, _ in warned(text)}


@pytest.mark.slow
def test_a_run_with_updates_too_small_and_then_a_gradient_that_overflows(tmp_path):
    engine = ["--vllm_dtype", "bfloat16", "--vllm_importance_sampling_correction", "true"]
    cut = ["--vllm_importance_sampling_mode", "token_truncate", "--vllm_importance_sampling_clip_max", 1.0]
    reward = ["--reward_funcs", "test_alarms.by_parity"]
    text = run(*engine, *cut, *reward, "--learning_rate", 1e-10, "--output_dir", tmp_path, code=1)
    assert warned(text) == [("importance_cut", "2"), ("update_lost", "3")]
    [error] = [line for line in text.splitlines() if line.startswith("error: ")]
    assert "not finite at step 4" in error or "grad_norm is inf at step 4" in error
    assert "Traceback" not in text
    assert not (tmp_path / "checkpoint-4").exists(), "what is not finite is not saved"
    assert len(history(tmp_path, 3)) == 3


TORN_ENGINE = """
import runpy, sys
del sys.argv[0]
from fura_rl.sync.weight_sync import WeightSync
sync = WeightSync.sync

def then_torn(self, everything=False):
    report = sync(self, everything)
    if report.version == 3:
        self.engine.model.modules["model.norm"].weight.data.fill_(float("nan"))
    return report

WeightSync.sync = then_torn
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_a_run_whose_engine_begins_to_compute_nan_stops_before_it_trains_on_it(tmp_path):
    words = [sys.executable, "-c", TORN_ENGINE, *RUN, "--output_dir", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=400, cwd=REPOSITORY, env=child_environment())
    assert done.returncode == 1, done.stderr[-3000:]
    [error] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert re.search(r"(\d+) of \1 sampled tokens have a rollout log-prob that is not finite", error)
    assert "Traceback" not in done.stderr
    assert len(history(tmp_path, 2)) == 2, "what was trained before is kept"
    assert not (tmp_path / "checkpoint-3").exists()
