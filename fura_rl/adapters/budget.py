"""How many parameters a method trains on a model, and the setting at which it trains as many as another.

Counted on the model itself, built without memory (torch's meta device) and adapted by the method's own code.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedConfig

from fura_rl.adapters.registry import find_method, peft_config_for, target_names, trained_parameters

if TYPE_CHECKING:
    from trl import ModelConfig


def count_trained(
    name: str,
    model_config: PreTrainedConfig,
    model_args: ModelConfig,
    target_modules: list[str] | None = None,
    adapter_kwargs: dict[str, Any] | None = None,
) -> int:
    """How many numbers method `name` trains on a model of this architecture.

    Raises:
        ValueError: where the method or a setting does not exist, or does not fit the model.
    """
    method = find_method(name)
    config = peft_config_for(name, model_args, target_modules, adapter_kwargs)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(model_config))
        policy = model if config is None else get_peft_model(model, config)
        if method.freeze is not None:
            method.freeze(policy, target_names(target_modules, policy))
    return trained_parameters(policy, name, model_args, adapter_kwargs)


def match_budget(
    name: str,
    budget: int,
    model_config: PreTrainedConfig,
    model_args: ModelConfig,
    target_modules: list[str] | None = None,
    adapter_kwargs: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """`adapter_kwargs` with the method's capacity set so that it trains as nearly `budget` parameters as it can.

    Unchanged where nothing decides the capacity (full, svd, fura).
    """
    given = dict(adapter_kwargs or {})
    capacity = find_method(name).capacity
    if capacity is None:
        return given

    @functools.cache
    def count(value: int) -> int:
        return count_trained(
            name, model_config, model_args, target_modules, {**(adapter_kwargs or {}), capacity: value}
        )

    values = capacity_values(capacity, model_config, target_modules)
    return given | {capacity: nearest(values, count, budget, find_method(name).capacity_grows)}


def capacity_values(capacity: str, model_config: PreTrainedConfig, target_modules: list[str] | None) -> list[int]:
    """The values that a capacity may take on this model, ascending."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(model_config))
    targets = target_names(target_modules, model)
    shapes = [
        tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] in targets
    ]
    if capacity == "oft_block_size":  # blocks of one size must tile every layer's input
        common = math.gcd(*(columns for _, columns in shapes))
        return [size for size in range(2, common + 1) if common % size == 0]
    return list(range(1, min(min(shape) for shape in shapes) + 1))


def nearest(values: list[int], count: Callable[[int], int], budget: int, grows: bool) -> int:
    """The value whose count is nearest to `budget`, by bisection of a monotone count."""
    ordered = values if grows else values[::-1]
    low, high = 0, len(ordered) - 1
    while low < high:  # the first value that trains at least the budget
        middle = (low + high) // 2
        low, high = (low, middle) if count(ordered[middle]) >= budget else (middle + 1, high)
    return min(ordered[max(0, low - 1) : low + 1], key=lambda value: abs(count(value) - budget))
