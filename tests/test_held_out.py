"""Held-out pass@k while training goes on: the figures, the checkpoint kept by them, and a training left undisturbed."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import REPOSITORY, one_trainer_engine

from fura_rl.checkpoint import last_checkpoint
from fura_rl.config import parse_arguments
from fura_rl.data import load_splits
from fura_rl.evaluation.estimators import doubling_ks
from fura_rl.evaluation.held_out import HeldOut
from fura_rl.run import load_held_out, prepare_run, train
from fura_rl.trainer_settings import check_settings

OPTIONS = [
    *("--config", str(REPOSITORY / "configs" / "quickstart.yaml"), "--max_steps", "6", "--learning_rate", "1e-2"),
    *("--per_device_train_batch_size", "32", "--save_steps", "2", "--save_total_limit", "2", "--logging_steps", "1"),
]
EVALUATE = [
    *("--eval_strategy", "steps", "--eval_steps", "2", "--eval_problems", "40", "--eval_samples", "4"),
    *("--dataset_eval_split", "validation", "--metric_for_best_model", "pass@1", "--load_best_model_at_end", "true"),
]


def held_out(**changes):
    settings = {"tokenizer": None, "prompts": ["a", "b"], "golds": ["1", "2"], "samples": 8, "temperature": 1.0}
    return HeldOut(**(settings | {"max_tokens": 8, "seed": 0} | changes))


@pytest.mark.parametrize(("n", "ks"), [(0, []), (1, [1]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_pass_at_k_is_told_at_powers_of_two_and_at_n(n, ks):
    assert doubling_ks(n) == ks


def test_what_cannot_be_evaluated_is_refused():
    with pytest.raises(ValueError, match="2 prompts and 1 golds"):
        held_out(golds=["1"])
    with pytest.raises(ValueError, match="0 prompts and 0 golds"):
        held_out(prompts=[], golds=[])
    with pytest.raises(ValueError, match="eval_samples=0 must be at least 1"):
        held_out(samples=0)


@pytest.mark.parametrize(("metric", "known"), [(None, True), ("pass@1", True), ("eval_pass@8", True), ("loss", False)])
def test_a_metric_that_nothing_measures_is_refused_before_a_model_is_loaded(metric, known):
    args = parse_arguments(OPTIONS).training
    args.metric_for_best_model = metric
    if known:
        check_settings(args, None, held_out())
    else:
        with pytest.raises(ValueError, match="'loss' is not measured; use one of greedy, pass@1, pass@2, "):
            check_settings(args, None, held_out())


def test_the_split_evaluated_during_training_can_be_another_than_the_one_at_its_ends():
    def load(options):
        arguments = parse_arguments([*OPTIONS, *options])
        return load_held_out(arguments, SimpleNamespace(chat_template="x"), load_splits(arguments.script))

    ends, during = load(EVALUATE)
    assert len(ends.prompts) == len(during.prompts) == 40
    assert ends.prompts != during.prompts
    assert during.measures == ["greedy", "pass@1", "pass@2", "pass@4"]
    with pytest.raises(ValueError, match="eval_problems=201 exceeds the 200 problems of quickstart's validation split"):
        load([*EVALUATE, "--eval_problems", "201"])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same short run twice on one engine, without and with evaluation; (run, folder, training log) of each."""
    with one_trainer_engine():
        finished = {}
        for name, options in {"without": ["--eval_problems", "0"], "with": EVALUATE}.items():
            folder = tmp_path_factory.mktemp(name)
            run = prepare_run(parse_arguments([*OPTIONS, *options, "--output_dir", str(folder)]))
            run.held_out = None  # nothing before training
            run.trainer.weight_sync.sync(everything=True)  # the engine comes with the weights of the run before
            train(run)
            history = json.loads((folder / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
            finished[name] = (run, folder, history)
        yield finished


def training_numbers(history):
    timed = ("seconds", "time", "audit_gain_min")  # timing decides on what is audited
    return [
        {key: value for key, value in entry.items() if not any(word in key for word in timed)}
        for entry in history
        if "loss" in entry
    ]


@pytest.mark.slow
def test_evaluation_leaves_the_training_as_it_would_have_been(runs):
    without, evaluated = (training_numbers(history) for _, _, history in runs.values())
    assert len(without) == 6
    assert any(entry["reward_std"] > 0 for entry in without)
    for expected, actual in zip(without, evaluated, strict=True):
        assert actual == expected


@pytest.mark.slow
def test_evaluation_is_logged_by_name_and_the_best_checkpoint_is_kept_and_loaded(runs):
    run, folder, history = runs["with"]
    evaluations = [entry for entry in history if "eval_pass@1" in entry]
    assert [entry["step"] for entry in evaluations] == [2, 4, 6]
    for entry in evaluations:
        assert entry.keys() == {"epoch", "step", "eval_greedy", "eval_pass@1", "eval_pass@2", "eval_pass@4"}
        assert entry["eval_pass@1"] <= entry["eval_pass@2"] <= entry["eval_pass@4"]
    values = {entry["step"]: entry["eval_pass@1"] for entry in evaluations}
    assert len(set(values.values())) > 1, "the policy moves, and the engine with it"
    best = max(values, key=values.__getitem__)
    state = run.trainer.state
    assert (state.best_global_step, state.best_metric) == (best, values[best])
    assert state.best_model_checkpoint == str(folder / f"checkpoint-{best}")
    kept = {path.name for path in folder.glob("checkpoint-*")}
    assert kept == {f"checkpoint-{best}", "checkpoint-6" if best != 6 else "checkpoint-4"}, "save_total_limit=2"
    assert last_checkpoint(folder) == folder / "checkpoint-6"
    metrics = run.trainer.evaluate()
    assert metrics["eval_pass@1"] == values[best], "the policy is the best one again, and so is the engine"
    assert run.trainer.phase_seconds["evaluation"] > 0


@pytest.mark.slow
def test_audits_are_paid_for_by_the_rollouts_of_training(runs):
    sync = runs["with"][0].trainer.weight_sync
    assert sync.audits.every is None
    assert sync.rollout_seconds() == runs["with"][0].trainer.phase_seconds["rollout"] > 0


@pytest.mark.slow
def test_evaluation_keeps_the_random_state_of_its_caller(runs):
    run, _, _ = runs["with"]
    before = torch.get_rng_state()
    run.trainer.evaluate()
    assert torch.equal(torch.get_rng_state(), before)
