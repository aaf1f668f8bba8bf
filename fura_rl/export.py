"""From an adapter to checkpoints that need no fura_rl: the policy folded into its base, or a LoRA close to it."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import fura_rl  # noqa: F401  registers this package's methods with PEFT
from fura_rl import fingerprint
from fura_rl.adapters.quantized import keep_layout
from fura_rl.config import resolve_model
from fura_rl.model_card import write_card
from fura_rl.sync import probe
from fura_rl.sync.fold import checkpoint_weights

if TYPE_CHECKING:
    from peft import PeftModel

ADAPTER_FILE = "adapter_config.json"


@dataclass(frozen=True)
class LayerError:
    """How well a LoRA of the chosen rank stands for one layer's update D: |D - s B A| / |D|, Frobenius norms."""

    name: str
    update_norm: float
    error_norm: float

    @property
    def relative(self) -> float:
        return self.error_norm / self.update_norm if self.update_norm else 0.0


def is_adapter(name: str) -> bool:
    return (Path(name) / ADAPTER_FILE).is_file()


def base_of(adapter: str, base_model: str | None) -> tuple[str, dict[str, Any] | None]:
    """The base model of an adapter folder, checked against the adapter's record of it, and that record.

    Raises:
        ValueError: where it is not to be found, or is another model than the adapter was trained on.
    """
    recorded = json.loads((Path(adapter) / ADAPTER_FILE).read_text()).get("base_model_name_or_path")
    try:
        base = resolve_model(base_model or recorded)
    except ValueError as error:
        raise ValueError(f"the base model of adapter {adapter!r}: {error}. Name it with --base_model") from error
    return base, fingerprint.check_base(adapter, base)


def load_policy(adapter: str, base_model: str, quantization: str | None, dtype: str = "auto") -> PeftModel:
    """The policy as it was trained: base (quantized where it was) and adapter."""
    from peft import PeftModel

    model = AutoModelForCausalLM.from_pretrained(
        base_model, dtype=dtype, quantization_config=quantization_config(quantization)
    )
    for module in model.modules():
        keep_layout(module)  # a 4-bit weight must stay readable
    return PeftModel.from_pretrained(model, adapter).eval()


def quantization_config(kind: str | None) -> Any:
    """bitsandbytes' settings for a recorded quantization; None for none."""
    if kind is None:
        return None
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=True)


@torch.no_grad()
def folded_model(policy: PeftModel, dtype: torch.dtype) -> PreTrainedModel:
    """The policy as a plain model: every adapter folded in float32, then rounded once to `dtype`."""
    config = copy.deepcopy(policy.get_base_model().config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    state = {weight.name: weight.value().to(dtype).clone() for weight in checkpoint_weights(policy)}
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config, dtype=dtype)
    plain.load_state_dict(state, strict=False, assign=True)
    plain.tie_weights()
    left_out = [name for name, parameter in plain.named_parameters() if parameter.is_meta]
    if left_out:
        raise RuntimeError(f"the policy gave no value for {', '.join(left_out[:5])}")
    return plain


def fold_checkpoint(adapter: str, base_model: str, quantization: str | None, output_dir: Path, dtype: str) -> Path:
    """Write the policy of an adapter as a plain checkpoint with its tokenizer.  `dtype` "auto" is the base's own."""
    policy = load_policy(adapter, base_model, quantization, dtype)
    chosen = policy.get_base_model().dtype if dtype == "auto" else getattr(torch, dtype)
    folded_model(policy, chosen).save_pretrained(output_dir)
    save_tokenizer(adapter, base_model, output_dir)
    return output_dir


def save_tokenizer(adapter: str, base_model: str, output_dir: Path) -> None:
    source = adapter if (Path(adapter) / "tokenizer_config.json").is_file() else base_model
    AutoTokenizer.from_pretrained(source).save_pretrained(output_dir)


@torch.no_grad()
def updates(policy: PeftModel, base_model: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Every adapted matrix's update, folded minus base (out, in) in float32, by module name.

    The base is read again from its checkpoint, since some methods change the one that they are loaded into.
    """
    base = AutoModelForCausalLM.from_pretrained(base_model, dtype="auto").state_dict()
    for weight in checkpoint_weights(policy):
        if weight.layer is not None and len(weight.shape) == 2:
            yield weight.module_name, weight.value().float() - base[weight.name].float()


@torch.no_grad()
def export_lora(
    adapter: str, base_model: str, quantization: str | None, rank: int, output_dir: Path
) -> list[LayerError]:
    """Write the best LoRA of rank `rank` for each layer's update (its truncated SVD) as a PEFT checkpoint.

    Raises:
        ValueError: where a layer is smaller than the rank, or the adapter changes no linear layer.
    """
    from peft import LoraConfig, get_peft_model

    policy = load_policy(adapter, base_model, quantization)
    deltas = dict(updates(policy, base_model))
    if not deltas:
        raise ValueError(f"adapter {adapter!r} changes no linear layer, so there is nothing that a LoRA could hold")
    small = [name for name, delta in deltas.items() if rank > min(delta.shape)]
    if rank < 1 or small:
        limit = min(min(delta.shape) for delta in deltas.values())
        raise ValueError(f"--lora_rank {rank} must lie between 1 and {limit}, the smallest side of an adapted layer")
    model = AutoModelForCausalLM.from_pretrained(base_model, dtype="auto")
    model.name_or_path = base_model
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=sorted(deltas), task_type="CAUSAL_LM")
    lora = get_peft_model(model, config)
    errors = []
    for name, delta in deltas.items():
        left, values, right = torch.linalg.svd(delta, full_matrices=False)
        root = values[:rank].sqrt()
        layer = lora.get_base_model().get_submodule(name)
        put(layer.lora_B["default"].weight, left[:, :rank] * root)
        put(layer.lora_A["default"].weight, root[:, None] * right[:rank])
        errors.append(LayerError(name, float(delta.norm()), float(values[rank:].norm())))
    lora.save_pretrained(output_dir)
    save_tokenizer(adapter, base_model, output_dir)
    return errors


def put(parameter: nn.Parameter, value: torch.Tensor) -> None:
    parameter.data = value.to(parameter.dtype).contiguous()


def total_error(errors: list[LayerError]) -> float:
    """|D - s B A| / |D| over all layers at once."""
    total = sum(error.update_norm**2 for error in errors)
    return (sum(error.error_norm**2 for error in errors) / total) ** 0.5 if total else 0.0


PROBE_TEXT = "What is 27 + 15? Think step by step and put the final answer in \\boxed{}."


def probe_gap(left: nn.Module, right: nn.Module, tokenizer: Any) -> float:
    """Largest difference of log-probs, in nats, on a few tokens of text."""
    ids = tokenizer(PROBE_TEXT)["input_ids"]
    return probe.max_gap(probe.trainer_logprobs(left, ids), probe.trainer_logprobs(right, ids))


def export(adapter: str, output_dir: Path, base_model: str | None, dtype: str, lora_rank: int | None) -> str:
    """Write the export and its card; returns what to tell the user.

    Raises:
        ValueError: where the adapter or its base is not there or not the right one, the output exists, or the dtype or
            rank has no meaning.
    """
    if not is_adapter(adapter):
        raise ValueError(f"{adapter!r} has no {ADAPTER_FILE}, so is no adapter checkpoint")
    if output_dir.exists() and any(output_dir.iterdir()):
        raise ValueError(f"the output folder {str(output_dir)!r} exists and is not empty; name a new one")
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype {dtype!r} is not auto, float32, bfloat16 or float16")
    base, recorded = base_of(adapter, base_model)
    quantization = recorded["quantization"] if recorded else None
    figures = {"base checked": "by fingerprint" if recorded and recorded["weights"] else "no, not recorded"}
    if quantization:
        figures["base in training"] = f"quantized ({quantization})"
    tokenizer = AutoTokenizer.from_pretrained(base)
    policy = load_policy(adapter, base, quantization)
    if lora_rank is None:
        fold_checkpoint(adapter, base, quantization, output_dir, dtype)
        exported = AutoModelForCausalLM.from_pretrained(output_dir, dtype="auto").eval()
        figures["dtype"] = str(exported.dtype).removeprefix("torch.")
    else:
        errors = export_lora(adapter, base, quantization, lora_rank, output_dir)
        worst = max(errors, key=lambda error: error.relative)
        figures["rank"] = str(lora_rank)
        figures["relative error of the update"] = f"{total_error(errors):.4f}; {worst.name}: {worst.relative:.4f}"
        exported = load_policy(str(output_dir), base, None)
    figures["largest difference to the policy"] = f"{probe_gap(policy, exported, tokenizer):.2g} nats of log-prob"
    write_card(output_dir, base, adapter, "folded" if lora_rank is None else "lora", figures)
    return "\n".join([f"written  {output_dir}", *(f"{name}: {value}" for name, value in figures.items())])
