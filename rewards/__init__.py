"""Verifier-based rewards in TRL's signature.  Importable by itself: neither torch nor `fura_rl` is needed.

`sympy` and `math-verify` are imported at the first comparison, not here.
"""

from rewards.extract import completion_text, last_boxed
from rewards.math_reward import Grade, grade, math_reward
from rewards.registry import REWARDS, load_reward

__all__ = ["REWARDS", "Grade", "completion_text", "grade", "last_boxed", "load_reward", "math_reward"]
