"""Reward functions by name.  A new one is a file and a line here; anything else is reached by its dotted path."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from difflib import get_close_matches

REWARDS = {
    "math_reward": "rewards.math_reward.math_reward",
}


def load_reward(name: str) -> Callable[..., list[float]]:
    """The reward function of this name or dotted path.

    Raises:
        ValueError: where there is none, with the names that exist.
    """
    path = REWARDS.get(name, name)
    module_name, _, attribute = path.rpartition(".")
    if not module_name:
        near = get_close_matches(name, REWARDS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"reward_funcs={name!r} is not one of {', '.join(REWARDS)} nor a dotted path{hint}")
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"reward_funcs={name!r} cannot be imported: {error}") from error
