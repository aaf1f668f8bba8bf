"""Reward functions by name.  A new one is a file and a line here; anything else is reached by its dotted path.

A reward with settings is named as a call: `overlong_penalty(max_tokens=2048, cache_tokens=512)`.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

REWARDS = {
    "math_reward": "rewards.functions.math_reward",
    "boxed_format_reward": "rewards.functions.boxed_format_reward",
    "think_format_reward": "rewards.functions.think_format_reward",
    "overlong_penalty": "rewards.functions.overlong_penalty",
}


def load_reward(name: str) -> Callable[..., list[float | None]]:
    """The reward function of this name, dotted path, or call of either with literal settings.

    Raises:
        ValueError: where there is none, with the names that exist, or where the settings do not fit.
    """
    target, settings = read_call(name)
    path = REWARDS.get(target, target)
    module_name, _, attribute = path.rpartition(".")
    if not module_name:
        near = get_close_matches(target, REWARDS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"reward_funcs={name!r} is not one of {', '.join(REWARDS)} nor a dotted path{hint}")
    try:
        reward = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"reward_funcs={name!r} cannot be imported: {error}") from error
    if settings is None and not isinstance(reward, type):
        return reward
    try:
        return reward(**settings or {})
    except TypeError as error:
        raise ValueError(f"reward_funcs={name!r} has the wrong settings: {error}") from error


def read_call(name: str) -> tuple[str, dict[str, Any] | None]:
    """`f(a=1)` as ("f", {"a": 1}), a plain name as (name, None).  Only literals are read; nothing is run."""
    if not name.rstrip().endswith(")"):
        return name, None
    try:
        call = ast.parse(name.strip(), mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise ValueError("settings are given by keyword")
        return ast.unparse(call.func), {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"reward_funcs={name!r} is no name and no call with literal settings: {error}") from error
