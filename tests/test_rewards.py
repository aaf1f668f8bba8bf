"""The math reward: what is read as the answer, and what counts as equal to the gold."""

import inspect
import subprocess
import sys

import pytest

from rewards import completion_text, grade, last_boxed, load_reward, math_reward
from rewards.equality import is_readable


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{42}", "42"),
        (r"first \boxed{1}, no: \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed {7}", "7"),
        (r"\fbox{7}", "7"),
        (r"\boxed{\boxed{3}}", r"\boxed{3}"),
        (r"\boxed{1} and then \boxed{2", "1"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{2", None),
        ("42", None),
        ("", None),
    ],
)
def test_the_answer_is_the_last_closed_box(text, answer):
    assert last_boxed(text) == answer


def test_extraction_is_linear_in_the_text():
    assert last_boxed(r"\boxed{" * 200_000) is None
    assert last_boxed("{" * 200_000 + r"\boxed{1}") == "1"


@pytest.mark.parametrize(
    ("gold", "answer", "correct"),
    [
        ("42", "42", True),
        ("42", "42.0", True),
        ("42", "43", False),
        (r"\frac{1}{2}", "0.5", True),
        (r"\frac{1}{2}", r"\dfrac12", True),
        (r"3\sqrt{13}", r"3\sqrt{13}", True),
        (r"3\sqrt{13}", "3", False),  # a bare gold would be read as 3
        (r"3\sqrt{13}", r"\sqrt{117}", True),
        ("(1, 2)", "(1,2)", True),
        ("(1, 2)", "(2,1)", False),
        ("x+1", "1+x", True),
        ("x+1", "x-1", False),
    ],
)
def test_equality_of_answer_and_gold(gold, answer, correct):
    assert grade(rf"So the answer is $\boxed{{{answer}}}$.", gold) == (answer, correct)


def test_a_worked_gold_counts_by_its_last_box():
    gold = r"We get \boxed{6}; doubling, \boxed{12}."
    assert math_reward([r"\boxed{12}", r"\boxed{6}"], solution=[gold, gold]) == [1.0, 0.0]


def test_plain_and_chat_completions_earn_alike():
    texts = [r"\boxed{5}", r"\boxed{6}", "5"]
    chats = [[{"role": "assistant", "content": text}] for text in texts]
    golds = ["5"] * 3
    assert math_reward(texts, answer=golds) == math_reward(chats, answer=golds) == [1.0, 0.0, 0.0]


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


def test_golds_and_completions_must_pair_up():
    with pytest.raises(ValueError, match="zip"):
        math_reward([r"\boxed{1}", r"\boxed{2}"], answer=["1"])


def test_trls_hooks_get_the_extracted_answers_and_the_share_without_one():
    columns, metrics = {}, {}
    math_reward([r"\boxed{1}", "1"], answer=["1", "1"], log_extra=columns.__setitem__, log_metric=metrics.__setitem__)
    assert columns == {"extracted_answer": ["1", ""]}
    assert metrics == {"math_reward/no_answer_frac": 0.5}


@pytest.mark.parametrize("gold", ["", "  ", "$$"])
def test_an_empty_gold_is_unreadable_and_matches_nothing(gold):
    assert not is_readable(gold)
    assert not grade(r"\boxed{}", gold).correct


def test_rewards_load_by_name_and_by_dotted_path():
    assert load_reward("math_reward") is math_reward
    assert load_reward("rewards.math_reward.math_reward") is math_reward
    with pytest.raises(ValueError, match="did you mean 'math_reward'"):
        load_reward("math_rewrad")
    with pytest.raises(ValueError, match="cannot be imported"):
        load_reward("no_such_module.reward")


def test_the_signature_is_trls():
    assert next(iter(inspect.signature(math_reward).parameters)) == "completions"
    assert any(p.kind is p.VAR_KEYWORD for p in inspect.signature(math_reward).parameters.values())


def test_importing_rewards_brings_neither_torch_nor_sympy_nor_fura_rl():
    code = "import sys, rewards; print([m for m in ('torch', 'sympy', 'fura_rl', 'math_verify') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
