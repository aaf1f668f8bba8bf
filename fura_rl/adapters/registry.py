"""The table of adapter methods.  A new one is a file in `methods/` and a line here; `peft:<Class>` needs neither."""

from __future__ import annotations

import dataclasses
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import peft
from peft import PeftConfig, PromptLearningConfig
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn

from fura_rl.adapters.fura_tuner import PAPER_TARGETS
from fura_rl.adapters.methods import (
    dora,
    full,
    fura,
    hira,
    lift,
    lora,
    lora_full,
    milora,
    miss,
    oft,
    olora,
    pissa,
    qdora,
    qfura,
    qlora,
    randlora,
    rslora,
    svd,
)
from fura_rl.adapters.methods.method import AdapterMethod

if TYPE_CHECKING:
    from trl import ModelConfig

METHODS: dict[str, AdapterMethod] = {
    "fura": fura.METHOD,
    "svd": svd.METHOD,
    "qfura": qfura.METHOD,
    "lora": lora.METHOD,
    "rslora": rslora.METHOD,
    "dora": dora.METHOD,
    "pissa": pissa.METHOD,
    "milora": milora.METHOD,
    "olora": olora.METHOD,
    "randlora": randlora.METHOD,
    "oft": oft.METHOD,
    "hira": hira.METHOD,
    "miss": miss.METHOD,
    "qlora": qlora.METHOD,
    "qdora": qdora.METHOD,
    "lora_full": lora_full.METHOD,
    "lift": lift.METHOD,
    "full": full.METHOD,
}
PEFT_PREFIX = "peft:"  # any other method of PEFT, by the name of its config class
# Methods of PEFT that add no update to a weight: there is nothing to fold and so nothing to serve.
UNSERVABLE = {"AdaLoraConfig", "OSFConfig", "LilyConfig", "BeftConfig", "XLoraConfig", "LNTuningConfig"}


def find_method(name: str) -> AdapterMethod:
    """The method of this name.

    Raises:
        ValueError: where there is none, with the nearest name.
    """
    if name.startswith(PEFT_PREFIX):
        return peft_method(name)
    if name not in METHODS:
        near = get_close_matches(name, METHODS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"adapter={name!r} is not one of {', '.join(METHODS)}, nor peft:<ConfigClass>{hint}")
    return METHODS[name]


def peft_method(name: str) -> AdapterMethod:
    """A method of PEFT by its config class, with PEFT's own defaults: `peft:LoHaConfig`."""
    wanted = name.removeprefix(PEFT_PREFIX)
    configs = {
        key: value
        for key, value in vars(peft).items()
        if isinstance(value, type) and issubclass(value, PeftConfig) and value is not PeftConfig
    }
    if wanted not in configs:
        near = get_close_matches(wanted, configs, n=1)
        hint = f"; did you mean {PEFT_PREFIX + near[0]!r}?" if near else ""
        raise ValueError(f"adapter={name!r}: peft {peft.__version__} has no config class {wanted!r}{hint}")
    config = configs[wanted]
    if issubclass(config, PromptLearningConfig) or wanted in UNSERVABLE:
        raise ValueError(
            f"adapter={name!r} cannot be folded into the weights of a layer, so no rollout engine could serve it"
        )
    return AdapterMethod(
        config_class=config, summary=f"PEFT's {wanted} with its defaults", paper="-", paper_learning_rate=None
    )


def peft_config_for(
    name: str, model_args: ModelConfig, target_modules: list[str] | None, adapter_kwargs: dict[str, Any] | None
) -> PeftConfig | None:
    """The PEFT config of a method, or None where the model's own weights are trained.

    Raises:
        ValueError: for an unknown method, or a setting that its config does not have.
    """
    method = find_method(name)
    if method.config_class is None:
        own_settings(name, model_args, adapter_kwargs)
        return None
    known = {f.name for f in dataclasses.fields(method.config_class) if f.init}
    settings: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    if "target_modules" in known:
        settings["target_modules"] = peft_targets(target_modules)
    settings |= method.settings(model_args) | (adapter_kwargs or {})
    refuse_unknown(settings, known, method.config_class.__name__)
    return method.config_class(**settings)


def peft_targets(target_modules: list[str] | None) -> list[str] | str:
    """The modules to adapt as a PEFT config takes them: those given, by default the paper's; `all-linear` is a word."""
    targets = target_modules or list(PAPER_TARGETS)
    return targets[0] if targets == [INCLUDE_LINEAR_LAYERS_SHORTHAND] else targets


def target_names(target_modules: list[str] | None, model: nn.Module) -> list[str]:
    """The names of the modules to adapt; of `all-linear` every linear layer's of `model` but its output head's, as in
    PEFT."""
    targets = peft_targets(target_modules)
    if targets != INCLUDE_LINEAR_LAYERS_SHORTHAND:
        return targets
    head = model.get_output_embeddings()
    linear = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]
    return sorted({name.rpartition(".")[2] for name in linear})


def own_settings(name: str, model_args: ModelConfig, adapter_kwargs: dict[str, Any] | None) -> dict[str, Any]:
    """The settings of a method without a PEFT config: its defaults, TRL's, then `adapter_kwargs`.

    Raises:
        ValueError: for a setting that it does not have.
    """
    method = find_method(name)
    if adapter_kwargs and not method.optimizer_settings:
        raise ValueError(f"adapter={name!r} takes no adapter_kwargs, got {adapter_kwargs}")
    refuse_unknown(adapter_kwargs or {}, set(method.optimizer_settings), f"adapter {name!r}")
    return dict(method.optimizer_settings) | method.settings(model_args) | (adapter_kwargs or {})


def refuse_unknown(settings: dict[str, Any], known: set[str], owner: str) -> None:
    if unknown := sorted(set(settings) - known):
        hints = [
            f"{key!r}" + "".join(f" (did you mean {n!r}?)" for n in get_close_matches(key, known, n=1))
            for key in unknown
        ]
        raise ValueError(f"adapter_kwargs: {owner} has no setting {', '.join(hints)}")


def check_method(name: str, *, quantized: bool, beta: float) -> None:
    """Refuse what a method cannot do, before anything is loaded.

    Raises:
        ValueError: for an unknown method, a quantized base it cannot train, or a KL term against a base it has changed.
    """
    method = find_method(name)
    if quantized and not method.quantized_base:
        able = ", ".join(key for key, entry in METHODS.items() if entry.quantized_base)
        raise ValueError(f"adapter={name!r} cannot train over a quantized base; use one of {able}, or load 16 bits")
    if beta and method.shifts_base:
        raise ValueError(
            f"beta={beta:g} measures the KL to the adapter switched off, which for adapter={name!r} is not the base "
            "model (its start was taken out of the base weight); use beta=0 or another adapter"
        )


def trained_parameters(
    policy: nn.Module, name: str, model_args: ModelConfig, adapter_kwargs: dict[str, Any] | None = None
) -> int:
    """How many numbers training moves in a policy that is ready to train."""
    method = find_method(name)
    if method.count is not None:
        return method.count(policy, own_settings(name, model_args, adapter_kwargs))
    return sum(p.numel() for p in policy.parameters() if p.requires_grad)
