"""What `FuraGRPOTrainer` cannot serve, found before anything is loaded."""

from __future__ import annotations

import dataclasses
import os

from peft import PeftConfig, PeftType
from trl import GRPOConfig

from fura_rl.adapters.fura_config import FuraConfig
from fura_rl.alarms import AlarmSettings
from fura_rl.evaluation.held_out import HeldOut, metric_faults
from fura_rl.grpo_config import FuraGRPOConfig
from fura_rl.validation import RULES

OWN = {*FuraGRPOConfig.__annotations__, *(field.name for field in dataclasses.fields(AlarmSettings))}  # not TRL's


def check_settings(args: GRPOConfig | None, peft_config: PeftConfig | None, held_out: HeldOut | None = None) -> None:
    """Refuse what the sync or the evaluation cannot do.

    Raises:
        ValueError: with every fault at once.
    """
    faults = []
    if args is not None:
        faults += [*sharding_faults(args, peft_config), *value_faults(args), *sharing_faults(args, peft_config)]
    if held_out is not None:
        faults += metric_faults(getattr(args, "metric_for_best_model", None), held_out)
    faults += adapter_faults(peft_config)
    if "seed" in (getattr(args, "generation_kwargs", None) or {}):
        faults.append("generation_kwargs names a seed, with which all completions of a prompt are the same: set `seed`")
    if faults:
        raise ValueError("; ".join(faults))


def adapter_faults(peft_config: PeftConfig | None) -> list[str]:
    """What of the adapter would not reach the engine."""
    faults = []
    virtual_tokens = getattr(peft_config, "is_prompt_learning", False) or getattr(
        peft_config, "is_adaption_prompt", False
    )
    if virtual_tokens or getattr(peft_config, "peft_type", None) == PeftType.XLORA:
        faults.append(
            f"peft_config={type(peft_config).__name__} adds tokens to the input or weighs adapters by it, and the "
            "engine is sent folded weights alone: take an adapter that PEFT can merge"
        )
    if getattr(peft_config, "lora_bias", False):
        faults.append(
            "lora_bias=True trains a bias of the adapter's own, which the weight sync does not fold: set it to false, "
            "or train the layers' own biases with bias='lora_only'"
        )
    return faults


def value_faults(args: GRPOConfig) -> list[str]:
    """The project's own settings that are no valid choice or out of range; TRL looks at its own."""
    faults = []
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        if field.name not in OWN or value is None:
            continue
        if (choices := field.metadata.get("choices")) and value not in choices:
            faults.append(f"{field.name}={value!r} must be one of {', '.join(choices)}")
        expected, holds = RULES.get(field.name, ("", None))
        if holds and not holds(value):
            faults.append(f"{field.name}={value} must be {expected}")
    return faults


def sharing_faults(args: GRPOConfig, peft_config: PeftConfig | None) -> list[str]:
    """Why policy and engine cannot hold the base weights together, where `vllm_share_weights` asks for it."""
    if not getattr(args, "vllm_share_weights", False):
        return []
    obstacles = {
        f"vllm_mode={args.vllm_mode!r} has its weights in another process: use 'colocate'": (
            not args.use_vllm or args.vllm_mode != "colocate"
        ),
        "vllm_enable_sleep_mode discards them while the policy trains: set it to false": args.vllm_enable_sleep_mode,
        f"vllm_tensor_parallel_size={args.vllm_tensor_parallel_size} cuts them up: use 1": (
            args.vllm_tensor_parallel_size > 1
        ),
        "full fine-tuning moves the base weights themselves: name an adapter": peft_config is None,
    }
    return [f"vllm_share_weights: {obstacle}" for obstacle, present in obstacles.items() if present]


def sharding_faults(args: GRPOConfig, peft_config: PeftConfig | None) -> list[str]:
    """What is wrong with how the launcher or `args` shard the policy.

    Read from accelerate's environment variables: its state names a kind of sharding only once a trainer is made.
    """
    plugin = args.fsdp_plugin_args
    fsdp = bool(plugin) or is_set("ACCELERATE_USE_FSDP")
    zero = bool(args.deepspeed) or is_set("ACCELERATE_USE_DEEPSPEED")
    faults = []
    if (fsdp or zero) and args.use_vllm and args.vllm_mode == "colocate":
        faults.append(
            f"{'FSDP' if fsdp else 'DeepSpeed'} shards the policy, and vllm_mode='colocate' folds from whole base "
            "weights: use vllm_mode='server', where the engine reads its own, or DDP"
        )
    version = (plugin or {}).get("fsdp_version", os.environ.get("FSDP_VERSION", "1"))
    if fsdp and str(version) != "2":
        faults.append(f"fsdp_version={version} flattens parameters, which the weight sync cannot read: use 2")
    if zero and isinstance(peft_config, FuraConfig) and zero_stage(args) == 3:
        faults.append(
            "zero_stage=3 loads the base weights already cut up, and each FuRA adapter is made of a whole one: use "
            "configs/accelerate/fsdp2.yaml, or zero2.yaml"
        )
    if fsdp and isinstance(peft_config, FuraConfig) and is_set("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        faults.append(
            "fsdp_cpu_ram_efficient_loading=true leaves all processes but one without base weights, of which each "
            "FuRA adapter is made: set it to false"
        )
    return faults


def zero_stage(args: GRPOConfig) -> int | None:
    """DeepSpeed's stage, from the arguments or from what `accelerate launch` was told; None where it is in a file."""
    if isinstance(args.deepspeed, dict):
        return args.deepspeed.get("zero_optimization", {}).get("stage")
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "")
    return int(stage) if stage.isdigit() else None


def is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1", "yes")
