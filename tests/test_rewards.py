"""The math reward: what is read as the answer, the reward functions and their hooks, the registry, the command line."""

import asyncio
import inspect
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import rewards
from rewards import (
    boxed_format_reward,
    completion_text,
    grade,
    health,
    last_boxed,
    load_reward,
    math_reward,
    overlong_penalty,
    think_format_reward,
)
from rewards.__main__ import main
from rewards.extract import extract
from rewards.latex import normalise
from rewards.result import Result

FORBIDDEN = ("torch", "sympy", "fura_rl", "math_verify", "numpy", "transformers")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{42}", "42"),
        (r"first \boxed{1}, no: \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed {7}", "7"),
        (r"\fbox{7}", "7"),
        (r"\boxed 5", "5"),
        (r"\boxed{\boxed{3}}", r"\boxed{3}"),
        (r"\boxed{ \boxed{3} and", "3"),
        (r"\boxed{1} and then \boxed{2", "1"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{2", None),
        ("42", None),
        ("", None),
    ],
)
def test_the_answer_is_the_last_closed_box(text, answer):
    assert last_boxed(text) == answer
    assert extract(text).answer == answer


@pytest.mark.parametrize(
    ("text", "prefilled", "answer", "truncated"),
    [
        (r"<think>\boxed{1}</think> so \boxed{2}", False, "2", False),
        (r"<think>\boxed{1}</think> so", False, None, False),
        (r"<think>\boxed{1} hmm", False, None, True),
        (r"\boxed{1}</think> so \boxed{2}", False, "2", False),  # the prompt opened the block
        (r"\boxed{1} hmm", True, None, True),  # and it never closed
        (r"\boxed{1} hmm </think> \boxed{2}", True, "2", False),
        (r"<think>a</think>\boxed{1}<think>\boxed{2}", False, None, True),
        (r"<think>a</think>\boxed{1}<think>\boxed{2}</think>\boxed{3}", False, "3", False),
        (r"<reasoning>\boxed{1}</reasoning>\boxed{2}", False, "2", False),
        (r"unfinished \boxed{1", False, None, True),
    ],
)
def test_thinking_is_not_the_answer(text, prefilled, answer, truncated):
    extraction = extract(text, prefilled)
    assert (extraction.answer, extraction.truncated) == (answer, truncated)


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{" * 200_000,
        "{" * 200_000 + r"\boxed{1}",
        r"\boxed{5" + "}" * 1_000_000,
        r"\boxed{" * 100_000 + "5" + "}" * 100_000,
        r"\boxed " * 200_000,
        r"\boxed{1} " * 100_000,
        "The answer is " * 100_000,
        "<think>" * 200_000,
    ],
)
def test_extraction_is_linear_in_the_text(text):
    """Quadratic work on these megabytes would take hours; the time limit is the suite's own."""
    extract(text, phrase_fallback=True)


@pytest.mark.parametrize(
    ("text", "joined"),
    [
        (r"The roots are $\boxed{1}$ and $\boxed{-2}$.", "1, -2"),
        (r"\boxed{1}, \boxed{2}, \boxed{3}", "1, 2, 3"),
        (r"\boxed{1}. After a long detour through cases we get \boxed{2}", None),
        (r"\boxed{1} or \boxed{1}", None),
    ],
)
def test_adjacent_boxes_may_be_a_list(text, joined):
    assert extract(text).joined == joined


def test_a_phrase_counts_in_an_evaluation_only_and_is_told_apart():
    [training] = grade([("The answer is 5.", "5")], mode="training")
    [evaluation] = grade([("The answer is 5.", "5")], mode="evaluation")
    [boxed] = grade([(r"The answer is 6: \boxed{5}", "5")], mode="evaluation")
    assert training.status == "no_answer"
    assert (evaluation.status, evaluation.source) == ("correct", "phrase")
    assert (boxed.status, boxed.source) == ("correct", "box")


@pytest.mark.parametrize(
    ("completion", "gold", "training", "evaluation"),
    [
        (r"\boxed{5}", "5", "correct", "correct"),
        (r"\boxed{6}", "5", "incorrect", "incorrect"),
        (r"\boxed{}", "5", "no_answer", "no_answer"),
        (r"<think>\boxed{5}", "5", "truncated", "truncated"),
        (" ".join(rf"\boxed{{{i}}}" for i in range(1, 10)), "9", "ambiguous", "correct"),
        (r"\boxed{" + "1+" * 250 + "1}", "251", "too_long", "correct"),
        (r"\boxed{?}", "5", "unparseable", "unparseable"),
        (r"\boxed{\det a_{}^{}}", "5", "unparseable", "unparseable"),
        (r"\boxed{5}", "", "gold_unparseable", "gold_unparseable"),
        (r"\boxed{\sum_{k=1}^{10}k^2}", "385", "incorrect", "correct"),
        (r"\boxed{9^{9^{9}}}", "5", "incorrect", "incorrect"),
    ],
)
def test_every_status_and_what_the_modes_make_of_it(completion, gold, training, evaluation):
    assert grade([(completion, gold)], mode="training")[0].status == training
    assert grade([(completion, gold)], mode="evaluation")[0].status == evaluation


@pytest.mark.parametrize("text", ["0 0./0", "1 1/2.", "3 1./2", "2 1.5/2"])
def test_a_mixed_number_of_decimals_is_none_and_no_error(text):
    by_answer, by_gold = rewards.grade([(rf"\boxed{{{text}}}", "77"), (r"\boxed{77}", text)])
    assert (by_answer.reward, by_gold.reward or 0.0) == (0.0, 0.0)


def test_only_correct_pays():
    assert [Result(status).reward for status in rewards.STATUSES] == [1.0] + [0.0] * (len(rewards.STATUSES) - 1)


def test_a_cut_completion_without_an_answer_is_truncated():
    [result] = grade([rewards.Item("let me see", "5", truncated=True)])
    assert result.status == "truncated"


def test_items_come_in_several_forms_and_wrong_ones_are_named():
    forms = [(r"\boxed{1}", "1"), {"text": r"\boxed{1}", "answer": 1}, rewards.Item(r"\boxed{1}", "1")]
    assert all(result.correct for result in grade(forms))
    with pytest.raises(TypeError, match="one of gold, answer, solution"):
        grade([{"completion": "x"}])
    with pytest.raises(TypeError, match="not int"):
        grade([3])
    with pytest.raises(ValueError, match="mode='lenient' is not one of training, evaluation"):
        grade(forms, mode="lenient")


def test_a_datasets_tolerance_widens_what_is_equal():
    exact, tolerant = rewards.Item(r"\boxed{8.3}", "8.24"), rewards.Item(r"\boxed{8.3}", "8.24", tolerance=0.01)
    symbolic = rewards.Item(r"\boxed{\ln 2}", "0.69", tolerance=0.01)
    assert [result.correct for result in grade([exact, tolerant, symbolic])] == [False, True, True]


def test_a_worked_gold_counts_by_its_last_box_and_adjacent_boxes_as_a_list():
    gold = r"We get \boxed{6}; doubling, \boxed{12}."
    assert math_reward([r"\boxed{12}", r"\boxed{6}"], solution=[gold, gold]) == [1.0, 0.0]
    both = r"The roots are $\boxed{1}$ and $\boxed{-2}$."
    assert math_reward([r"\boxed{-2, 1}", r"\boxed{-2}"], solution=[both, both]) == [1.0, 0.0]


def test_plain_and_chat_completions_earn_alike():
    texts = [r"\boxed{5}", r"\boxed{6}", "5"]
    chats = [[{"role": "assistant", "content": text}] for text in texts]
    blocks = [[{"role": "assistant", "content": [{"type": "text", "text": text}]}] for text in texts]
    golds = ["5"] * 3
    for completions in (texts, chats, blocks):
        assert math_reward(completions, answer=golds) == [1.0, 0.0, 0.0]


def test_the_last_assistant_message_is_read():
    chat = [
        {"role": "assistant", "content": r"\boxed{1}"},
        {"role": "tool", "content": r"\boxed{2}"},
        {"role": "assistant", "content": r"\boxed{3}"},
    ]
    assert completion_text(chat) == r"\boxed{3}"
    assert completion_text([{"role": "assistant", "content": None}]) == ""
    with pytest.raises(TypeError, match="not int"):
        completion_text(3)


def test_answer_wins_over_solution_and_one_of_them_is_needed():
    assert math_reward([r"\boxed{1}"], answer=["1"], solution=[r"\boxed{2}"]) == [1.0]
    with pytest.raises(ValueError, match="answer_column"):
        math_reward([r"\boxed{1}"], prompts=["p"])
    with pytest.raises(ValueError, match="2 completions and 1 golds"):
        math_reward([r"\boxed{1}", r"\boxed{2}"], answer=["1"])


def test_an_unreadable_gold_is_none_so_that_trl_leaves_the_row_out():
    assert math_reward([r"\boxed{1}", r"\boxed{1}"], answer=["", "1"]) == [None, 1.0]


def test_where_trls_reward_is_right_ours_agrees_as_a_drop_in():
    from trl.rewards import accuracy_reward

    answers = [(r"\frac{1}{3}", r"\frac{2}{6}"), ("7", "8"), (r"\sqrt{8}", r"2\sqrt{2}"), ("x+1", "1+x"), ("5", "5")]
    completions = [[{"role": "assistant", "content": rf"Thus $\boxed{{{answer}}}$"}] for _, answer in answers]
    solutions = [f"${gold}$" for gold, _ in answers]
    assert math_reward(completions, solution=solutions) == accuracy_reward(completions, solutions)


def test_trls_hooks_get_the_answers_the_verdicts_and_every_share():
    columns, metrics = {}, {}
    math_reward([r"\boxed{1}", "1"], answer=["1", "1"], log_extra=columns.__setitem__, log_metric=metrics.__setitem__)
    assert columns["extracted_answer"] == ["1", ""]
    assert columns["verdict"] == ["correct (exact)", "no_answer (extraction)"]
    shares = {status: metrics[f"math_reward/{status}_frac"] for status in rewards.STATUSES}
    assert shares == dict.fromkeys(rewards.STATUSES, 0.0) | {"correct": 0.5, "no_answer": 0.5}
    for name in ("seconds_p50", "seconds_p99", "worker_kills", "worker_crashes", "worker_unconfined", "worker_rss_mib"):
        assert metrics[f"math_reward/{name}"] >= 0


def test_the_signature_is_trls():
    for reward in (math_reward, boxed_format_reward, think_format_reward):
        assert next(iter(inspect.signature(reward).parameters)) == "completions"
        assert any(p.kind is p.VAR_KEYWORD for p in inspect.signature(reward).parameters.values())


def test_over_one_percent_of_timeouts_raise_the_alarm_once_per_window(caplog):
    health._windows.clear()
    good, bad = Result("incorrect"), Result("timeout", answer="9^9^9")
    assert health.watch([good] * 98 + [bad], "r") == []  # too few items for a share
    with caplog.at_level(logging.WARNING):
        [warning] = health.watch([good] * 90 + [bad], "r")
    assert "2 timeout among the last 190 items" in warning
    assert "9^9^9" in caplog.text
    assert health.watch([good] * 500, "r") == []
    assert health.watch([good] * 600 + [bad] * 5, "r") == []  # 0.5%


def test_a_batch_of_which_nothing_can_be_read_raises_the_alarm():
    [warning] = health.watch([Result("unparseable", answer="??")] * 4, "r")
    assert "none of 4 items could be read" in warning


def test_format_rewards():
    texts = [r"<think>a</think> \boxed{1}", r"<think>a", r"\boxed{}", "b <think>a</think>", "<think><think></think>"]
    assert boxed_format_reward(texts) == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert think_format_reward(texts) == [1.0, 0.0, 0.0, 0.0, 0.0]


def test_think_format_reward_is_trls():
    from trl.rewards import think_format_reward as theirs

    texts = ["<think>\na\n</think>\nb", "<think>a", "<think></think>", "x<think>a</think>", "<think>a<think>b</think>"]
    texts += [
        "<think>a</think></think>",
        "\n<think>a</think>",
        "</think><think>",
        "<think>a</think><think>b</think>",
        "",
    ]
    assert think_format_reward(texts) == theirs([[{"content": text}] for text in texts])


def test_overlong_penalty_is_dapos_and_can_be_pickled():
    from trl.rewards import get_soft_overlong_punishment

    ids = [[1] * n for n in (0, 79, 80, 81, 90, 100, 101, 500)]
    ours = pickle.loads(pickle.dumps(overlong_penalty(max_tokens=100, cache_tokens=20)))
    assert ours(completion_ids=ids) == get_soft_overlong_punishment(100, 20)(ids)
    with pytest.raises(ValueError, match="cache_tokens=200"):
        overlong_penalty(max_tokens=100, cache_tokens=200)


def test_rewards_load_by_name_by_dotted_path_and_with_settings():
    assert load_reward("math_reward") is math_reward
    assert load_reward("rewards.functions.math_reward") is math_reward
    assert load_reward("overlong_penalty(max_tokens=10, cache_tokens=5)")(completion_ids=[[0] * 11]) == [-1.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("math_rewrad", "did you mean 'math_reward'"),
        ("no_such_module.reward", "cannot be imported"),
        ("overlong_penalty", "wrong settings"),
        ("overlong_penalty(max_tokens=__import__('os'))", "no call with literal settings"),
        ("overlong_penalty(10, 5)", "by keyword"),
    ],
)
def test_wrong_reward_names_are_explained(name, message):
    with pytest.raises(ValueError, match=message):
        load_reward(name)


@pytest.mark.parametrize(
    ("written", "normal"),
    [
        (r"1 \over 2", r"\frac{1}{2}"),
        (r"\sqrt{x \over {a\over b}}", r"\sqrt{\frac{x}{{\frac{a}{b}}}}"),
        (r"{20 \choose 3}+1", r"{\binom{20}{3}}+1"),
        (r"\overline{3}", r"\overline{3}"),
        (r"{1 \over 2", r"{1 \over 2"),  # it never closes
        (r"1}\over 2", r"1}\over 2"),
        (r"1\over 2\over 3", r"1\over 2\over 3"),  # TeX refuses it as well
        ("{{{7}}}", "7"),
        ("{1}+{2}", "{1}+{2}"),
    ],
)
def test_tex_infixes_and_braces_round_the_whole_are_respelled(written, normal):
    assert normalise(written) == normal
    assert normalise(normal) == normal


def test_every_registered_reward_is_there():
    for name, path in rewards.REWARDS.items():
        assert path.rpartition(".")[2] == name
        assert callable(load_reward(name if name != "overlong_penalty" else f"{name}(max_tokens=2, cache_tokens=1)"))


def test_importing_and_grading_bring_nothing_heavy_into_the_process():
    code = (
        "import sys, rewards; rewards.grade([(r'\\boxed{3\\ln 2}', r'\\ln 8')]);"
        f"print([m for m in {FORBIDDEN} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_agrade_gives_what_grade_gives():
    items = [(r"\boxed{3\ln 2}", r"\ln 8"), (r"\boxed{4\ln 2}", r"\ln 8"), (r"\boxed{1}", "1"), ("no", "1")]
    assert [r.status for r in asyncio.run(rewards.agrade(items))] == [r.status for r in grade(items)]


def test_golds_are_checked_by_meaning_not_by_being_the_same_string():
    golds = ["5", r"3\sqrt{13}", r"\text{no solution}", r"\ln 8", "", "$$", r"\frac{1}{0}", r"np.foo(\det", r"2^{n}-1"]
    found = [result.status == "correct" for result in rewards.check_golds(golds)]
    assert found == [True, True, True, True, False, False, False, False, True]


def test_the_command_line_grades_a_file_again(tmp_path, capsys):
    rows = [
        {"text": r"\boxed{1}", "gold": "1", "expected": True},
        {"completion": r"\boxed{2}", "answer": "1", "expected": True},
        {"completion": "The answer is 1.", "answer": "1"},
    ]
    source, out = tmp_path / "samples.jsonl", tmp_path / "graded.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["grade", str(source), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "1 of 2 labelled rows as expected" in printed
    assert "1 were read from" in printed
    assert [json.loads(line)["result"]["status"] for line in out.read_text().splitlines()] == [
        "correct",
        "incorrect",
        "correct",
    ]
    assert main(["golds", str(source)]) == 0


@pytest.mark.parametrize("content", ["", "not json\n", "[1]\n", '{"completion": "x"}\n'])
def test_the_command_line_explains_a_bad_file(tmp_path, capsys, content):
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    assert main(["grade", str(path)]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_the_package_installs_alone_and_grades_there(tmp_path):
    source, target = tmp_path / "rewards", tmp_path / "site"
    shutil.copytree(Path(rewards.__file__).parent, source, ignore=shutil.ignore_patterns("__pycache__"))
    install = ["install", "--quiet", "--no-deps", "--no-build-isolation", "--target", str(target), str(source)]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True)
    code = r"import rewards; print(rewards.__file__, rewards.grade([(r'\boxed{3\ln 2}', r'\ln 8')])[0].status)"
    environment = {**os.environ, "PYTHONPATH": str(target)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment, cwd=tmp_path.parent
    )
    assert done.stdout.split() == [str(target / "rewards" / "__init__.py"), "correct"]
