"""One module of a live vLLM model: whether its weights lie as in the checkpoint, and how it is packed again if not."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fura_rl.sync.factors import Factors
from fura_rl.sync.vllm_plan import Region

PROCESSED = "_already_called_process_weights_after_loading"  # vLLM's mark of a module that is quantized already


def is_in_checkpoint_layout(module: nn.Module, regions: list[Region]) -> bool:
    """Whether the live parameters are what the checkpoint holds, so that they can be written in place.

    CUDA graphs stay valid then: the storage is the same.  False for weights that were packed, padded or quantized.
    """
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    if not isinstance(getattr(module, "quant_method", None), UnquantizedLinearMethod | None) and not hasattr(
        module, "num_embeddings"
    ):
        return False
    loaded, _ = get_layerwise_info(module).restore_metadata
    for parameter in {region.parameter for region in regions}:
        live, start = getattr(module, parameter).data, loaded.get(parameter)
        if start is not None and (live.shape, live.stride()) != (start.shape, start.stride()):
            return False
    return True


def coarse_eps(module: nn.Module) -> float:
    """The eps of weights that the module keeps in 8-bit floats, whose rounding stands in every product; 0 of others."""
    dtypes = {parameter.dtype for parameter in module.parameters(recurse=False)}
    return max((torch.finfo(d).eps for d in dtypes if d.is_floating_point and d.itemsize == 1), default=0.0)


def keeps_a_packed_copy(module: nn.Module) -> bool:
    """Whether a CPU kernel of this module computes from a copy of a weight that is kept as well (an output head)."""
    if "cpu_linear" not in vars(module):
        return False
    weight = getattr(module, "weight", None)
    return weight is not None and weight.numel() > 0


def packs_faster_by_columns(module: nn.Module, regions: list[Region], factors: Factors | None) -> bool:
    """Whether the module's weight should be written column by column: in memory its transpose.

    oneDNN packs a float32 weight from that in half the time (measured, AVX-512), and the product of column blocks comes
    out that way by itself.  Every other rule would have to transpose what it writes, which takes longer than is won.
    """
    from vllm.platforms import current_platform

    if factors is None or factors.rule != "block_columns" or not hasattr(module, "cpu_linear"):
        return False
    matrices = [region for region in regions if region.parameter == "weight"]
    whole_rows = all(
        not region.transposed and region.stride == (region.total_columns, 1) and region.columns[0] == 0
        for region in matrices
    )
    # AMD's own library packs where it is installed
    return whole_rows and module.weight.dtype == torch.float32 and not current_platform.is_zen_cpu()


@contextmanager
def rebuilt(module: nn.Module, by_columns: bool = False) -> Any:
    """The module in checkpoint layout, uninitialised, to be filled; packed again into its kernel's tensors afterwards.

    With `by_columns` its weight lies in memory as its transpose.  Where filling it fails, the module is put together as
    it was, its kernel's tensors in their storage, which CUDA graphs read.  Where packing it fails, a CPU's packed
    weight is gone: to keep it until the new one is made would take its memory twice.  The module then computes nothing
    until it is rebuilt, which the next `LiveModel.write` does.
    vLLM's own steps for one layer of a reload.  One layer's worth of memory; on CPU glibc finds no place for an aligned
    block in the hole that one of its size left, so the heap grows by several (0.5 GB at 0.6B parameters).  To return
    each hole at once by `malloc_trim` keeps it to 70 MB and doubles the time of the fold, in page faults.
    """
    from vllm.model_executor.model_loader.reload import layerwise, meta
    from vllm.model_executor.model_loader.reload.utils import get_layer_params_buffers, get_layer_tensors

    info = layerwise.get_layerwise_info(module)
    info.kernel_tensors = get_layer_params_buffers(module)
    info.kernel_non_persistent_buffers = set(module._non_persistent_buffers_set)
    processed = {name: vars(module)[name] for name in (PROCESSED,) if name in vars(module)}
    in_place: list[tuple[torch.Tensor, torch.Tensor]] = []
    try:
        meta.restore_layer_on_meta(module, info)
        # vLLM leaves a bias where it is, to be filled live
        in_place = [(t, t.data.clone()) for t in get_layer_tensors(module).values() if not t.is_meta]
        meta.materialize_layer(module, info)
        if by_columns:
            module.weight.data = module.weight.data.view(module.weight.shape[::-1]).mT
        vars(module).pop(PROCESSED, None)
        yield
        if hasattr(module, "cpu_linear"):  # the packed weight before goes first, so that the new one takes its place
            del module.cpu_linear
        module.quant_method.process_weights_after_loading(module)
        pack_cpu_experts(module)
        if hasattr(module, "update_param_tp_status"):
            module.update_param_tp_status()
        layerwise._copy_and_restore_kernel_tensors(module, info)
    except BaseException:
        layerwise._place_kernel_tensors(module, info)
        vars(module).update(processed)
        for tensor, before in in_place:
            tensor.data.copy_(before)
        raise
    finally:
        info.reset()


def pack_cpu_experts(module: nn.Module) -> None:
    """Prepack experts on a CPU, which vLLM 0.31 does at the first load only: a reload of the same weights moves
    log-probs by nats (`UnquantizedFusedMoEMethod._setup_kernel`)."""
    from vllm.platforms import current_platform

    experts = getattr(getattr(module.quant_method, "moe_kernel", None), "fused_experts", None)
    if experts is not None and current_platform.is_cpu():
        experts.process_weights_after_loading(module)
