"""Verifier-based rewards for math: graded by meaning, in worker processes that cannot hang their caller.

Importable by itself: neither torch nor `fura_rl` is needed, and sympy is imported in worker processes only.

    import rewards
    [result] = rewards.grade([(r"so \\boxed{\\frac{1}{2}}", "0.5")])
    result.status, result.reward        # ("correct", 1.0)
"""

from rewards.extract import completion_text, last_boxed
from rewards.functions import boxed_format_reward, math_reward, overlong_penalty, think_format_reward
from rewards.grading import agrade, check_golds, close_workers, default_pool, grade, start_workers
from rewards.ladder import gold_answer
from rewards.pool import WorkerPool, WorkersError
from rewards.registry import REWARDS, load_reward
from rewards.result import STATUSES, Item, Result
from rewards.strictness import MODES, Strictness

__all__ = [
    "MODES",
    "REWARDS",
    "STATUSES",
    "Item",
    "Result",
    "Strictness",
    "WorkerPool",
    "WorkersError",
    "agrade",
    "boxed_format_reward",
    "check_golds",
    "close_workers",
    "completion_text",
    "default_pool",
    "gold_answer",
    "grade",
    "last_boxed",
    "load_reward",
    "math_reward",
    "overlong_penalty",
    "start_workers",
    "think_format_reward",
]
