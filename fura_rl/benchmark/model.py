"""Conversion of whole models: for real with its peak where they fit, every size by arithmetic on the meta device."""

from __future__ import annotations

import time
from typing import Any

import torch
from peft import get_peft_model
from torch import nn

from fura_rl.adapters import blocks, frames
from fura_rl.adapters.conversion import check_weight
from fura_rl.adapters.fura_config import FuraConfig
from fura_rl.adapters.fura_tuner import PAPER_TARGETS, fura_layers
from fura_rl.benchmark import measure
from fura_rl.benchmark.measure import Settings
from fura_rl.benchmark.models import layer_shapes, random_model


def run(settings: Settings) -> list[dict[str, Any]]:
    """One row per size: bytes of weights and adapter, the largest peak of converting one layer, and their sum.

    `convert_s` and `beyond_gb`, the peak beyond the model before, are measured on those of `settings.models` that fit
    into memory and "not run" for the others.
    """
    sizes = dict.fromkeys([*settings.models, *settings.sizes])
    return [describe(settings, size) for size in settings.budget.units("model", sizes)]


def describe(settings: Settings, size: str) -> dict[str, Any]:
    policy = adapted(random_model(size, torch.device("meta"), torch.bfloat16))
    trained = sum(p.nbytes for p in policy.parameters() if p.requires_grad)
    weights = sum(p.nbytes for p in policy.parameters()) - trained
    basis = sum(b.nbytes for name, b in policy.named_buffers() if "fura_core" in name)
    layer_peak = max(conversion_peak(settings, shape) for shape in layer_shapes(size))
    needed = weights + trained + basis + layer_peak
    measured: dict[str, Any] = {"convert_s": "not run", "beyond_gb": "not run"}
    if size in settings.models:
        try:
            measure.require_memory(needed, settings.device)
            measured = convert_for_real(settings, size)
        except torch.OutOfMemoryError as error:
            settings.budget.skip("model", f"the conversion of {size}", str(error).splitlines()[0])
    return {
        "model": size,
        "weights_gb": weights / 1e9,
        "adapter_gb": (trained + basis) / 1e9,
        "layer_peak_gb": layer_peak / 1e9,
        "sum_gb": needed / 1e9,
        **measured,
    }


def adapted(model: nn.Module) -> nn.Module:
    return get_peft_model(model, FuraConfig(target_modules=PAPER_TARGETS))


def conversion_peak(settings: Settings, shape: tuple[int, int]) -> int:
    out_features, in_features = shape
    weight = torch.randn(out_features, in_features, device=settings.device).to(torch.bfloat16)
    size = blocks.default_block_size(in_features, out_features)

    def convert() -> None:
        check_weight(weight, "the layer")
        frames.svd_frame(weight, size)

    return measure.peak_process_bytes(convert, settings.device)


def convert_for_real(settings: Settings, size: str) -> dict[str, float]:
    model = random_model(size, settings.device, torch.bfloat16)
    seconds, policies = [], []

    def convert() -> None:
        started = time.perf_counter()
        policies.append(adapted(model))
        measure.synchronize(settings.device)
        seconds.append(time.perf_counter() - started)

    beyond = measure.peak_process_bytes(convert, settings.device)
    check_frames(policies[0])
    return {"convert_s": seconds[0], "beyond_gb": beyond / 1e9}


@torch.no_grad()
def check_frames(policy: nn.Module) -> None:
    """Every block's W V0 must have columns at right angles, of lengths S0: that is what an SVD is, in one product.

    Raises:
        RuntimeError: where a layer's do not.
    """
    for layer in fura_layers(policy):
        core = layer.fura_core["default"]
        weight = layer.pristine_weight().float()
        columns = weight.unflatten(1, (-1, core.block_size)).transpose(0, 1) @ core.basis_v
        name = f"the frame of {layer.layer_name}"
        measure.check(name, columns.mT @ columns, torch.diag_embed(core.basis_s.square()), torch.float32)
