"""bitsandbytes as FuRA and the weight sync need it: NF4 tensors, and quantized layers whose weight can be read back."""

from __future__ import annotations

import warnings

import torch
from peft.utils import resolve_quantization_backend
from peft.utils.integrations import dequantize_bnb_weight
from torch import nn


def nf4_parameter(weight: torch.Tensor) -> nn.Parameter:
    """`weight` in NF4 with double quantization (QLoRA, arXiv 2305.14314): 4.127 bits a number.

    Of a weight without values (meta device) codes of the right shape and no scales; `nf4_from_saved` makes the rest.

    Raises:
        ImportError: where bitsandbytes is not installed.
    """
    try:
        import bitsandbytes as bnb
    except ImportError as error:
        raise ImportError("quantize_core='nf4' needs bitsandbytes: pip install bitsandbytes") from error
    options = {"requires_grad": False, "quant_type": "nf4", "compress_statistics": True, "blocksize": 64}
    if weight.device.type == "meta":
        codes = weight.new_empty((weight.numel() + 1) // 2, 1, dtype=torch.uint8)  # two to a byte
        return bnb.nn.Params4bit(codes, bnb_quantized=True, **options)
    narrow = weight.float() if weight.dtype == torch.float64 else weight  # bitsandbytes takes 16 and 32 bits
    parameter = bnb.nn.Params4bit(narrow.contiguous(), **options)
    return parameter.to(weight.device)  # bitsandbytes quantizes at the move to a device


def nf4_scales(weight: nn.Parameter) -> dict[str, torch.Tensor]:
    """What the codes of an NF4 tensor need beside them to be numbers, as bitsandbytes saves it; none on meta."""
    return {} if weight.quant_state is None else weight.quant_state.as_dict(packed=True)


def nf4_from_saved(codes: torch.Tensor, scales: dict[str, torch.Tensor], device: torch.device) -> nn.Parameter:
    """The NF4 tensor of saved codes and `nf4_scales`."""
    import bitsandbytes as bnb

    return bnb.nn.Params4bit.from_prequantized(codes.as_subclass(torch.Tensor), dict(scales), device=device)


def nf4_linear(x: torch.Tensor, weight: nn.Parameter) -> torch.Tensor:
    """x W^T for W in NF4, in the dtype of x."""
    import bitsandbytes as bnb

    if x.dtype == torch.float64:  # for which bitsandbytes 0.50 has no CPU kernel: its result would be memory as it was
        return nn.functional.linear(x, nf4_dense(weight).to(x.dtype))
    return bnb.matmul_4bit(x, weight.t(), quant_state=weight.quant_state)


def nf4_dense(weight: nn.Parameter) -> torch.Tensor:
    return dequantize_bnb_weight(weight, state=weight.quant_state)


def holds_packed_weight(module: nn.Module) -> bool:
    """Whether this layer's `weight` is quantized: its parameter is then no number that could be loaded or folded."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and not weight.is_floating_point()


def dequantized_weight(module: nn.Module) -> torch.Tensor:
    """The weight (out, in) that a quantized layer computes with.

    Raises:
        NotImplementedError: where its quantization gives no weight back.
    """
    backend = resolve_quantization_backend(module)
    if backend is None or was_repacked(module):
        raise NotImplementedError(
            f"{type(module).__name__} holds {module.weight.dtype} weights in a layout that PEFT cannot read back; load "
            "the model with bitsandbytes or unquantized"
        )
    return backend.get_base_weight(module)


def was_repacked(module: nn.Module) -> bool:
    """Whether bitsandbytes has rewritten a 4-bit weight for its AVX512 kernel, which dequantization then misreads."""
    return bool(getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False))


def keep_layout(module: nn.Module) -> None:
    """Keep bitsandbytes from rewriting a 4-bit weight at its first forward in eval mode on a CPU with AVX512-BF16.

    That layout is for inference: reading the weight back (a merge, a fold) would give noise without an error.  A weight
    rewritten already is brought back, with a warning, since its scales were rounded to bfloat16 for good.  Read in
    bitsandbytes 0.50, `Linear4bit.forward` and `_save_to_state_dict`.
    """
    if not hasattr(module, "support_avx512bf16_for_cpu"):
        return
    module.support_avx512bf16_for_cpu = False
    if was_repacked(module):
        module.state_dict()  # bitsandbytes unpacks the live weight before it saves one
        warnings.warn(
            "a 4-bit weight was repacked for inference before it was adapted, which rounds its scales: adapt the model "
            "before its first forward in eval mode to keep the quantization it was loaded with",
            stacklevel=2,
        )
