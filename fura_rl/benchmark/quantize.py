"""What 4 bits cost: NF4 of the weight against NF4 of FuRA's large core (QFuRA), for random and real-shaped spectra."""

from __future__ import annotations

from typing import Any

import torch

from fura_rl.adapters import blocks, frames
from fura_rl.adapters.quantized import nf4_dense, nf4_parameter
from fura_rl.benchmark import measure
from fura_rl.benchmark.measure import Settings

NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)  # codes, 8-bit scales of 64 numbers, their float32 scales of 256
SPECTRUM_EXPONENT = 0.5  # of a pretrained projection's singular values, s_k ~ k^-0.5 with a heavy first few


def run(settings: Settings) -> list[dict[str, Any]]:
    cases = [(shape, kind) for shape in settings.shapes for kind in ("random", "real-shaped")]
    return [row for shape, kind in settings.budget.units("quantize", cases) for row in compare(settings, shape, kind)]


def make_weight(shape: tuple[int, int], kind: str, device: torch.device) -> torch.Tensor:
    """Gaussian, or with a power-law spectrum and columns of uneven size, as pretrained projections have them."""
    torch.manual_seed(0)
    weight = torch.randn(shape, device=device)
    if kind == "real-shaped":
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        values = torch.arange(1, len(values) + 1, device=device).float().pow(-SPECTRUM_EXPONENT)
        weight = (left * values) @ right * torch.exp(0.5 * torch.randn(shape[1], device=device))
    return 0.02 * weight / weight.std()


def compare(settings: Settings, shape: tuple[int, int], kind: str) -> list[dict[str, Any]]:
    weight = make_weight(shape, kind, settings.device)
    out_features, in_features = shape
    size = blocks.default_block_size(in_features, out_features)

    def plain() -> torch.Tensor:
        return nf4_dense(nf4_parameter(weight))

    def qfura(treatment: str) -> torch.Tensor:
        frame = frames.svd_frame(weight, size)
        scale = blocks.core_scale(frame.singular_values, treatment, "small")
        large = nf4_dense(nf4_parameter(blocks.large_core(weight, frame.right, scale)))
        return blocks.fold(large, blocks.starting_core(frame.right, scale))

    contenders = {
        "NF4(W)": plain,
        "NF4(L) S R": lambda: qfura("train"),
        "NF4(L S^1/2) S^1/2 R": lambda: qfura("split"),
        "NF4(L S) R": lambda: qfura("merge_frozen"),
    }
    small_bits = 16 * (in_features * size + in_features) / weight.numel()  # R and S in 16 bits
    return [
        {
            "shape": f"{in_features}->{out_features}",
            "spectrum": kind,
            "storage": name,
            "relative_error": measure.relative_error(call(), weight),
            "bits_per_weight": NF4_BITS + (0 if name == "NF4(W)" else small_bits),
            "peak_mb": measure.peak_bytes(call, settings.device) / 1e6,
        }
        for name, call in contenders.items()
    ]
