"""What the sync imports of vLLM's insides, and the version that was read in: 0.31.0, CPU and CUDA sources.

`check_layout` looks for all of it, so that an upgrade that moves one ends with a message and not with stale weights.
Only the files vllm_*.py touch vLLM's insides.
"""

from __future__ import annotations

import importlib
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

VLLM_VERSIONS_READ = "0.31"

PRIVATE_NAMES = {
    "vllm.distributed.weight_transfer.sharded_rdt_fake": ("BakeSink", "FakeRDTTensor"),
    "vllm.distributed.weight_transfer.sharded_rdt_engine": ("ShardedRDTWeightTransferEngine",),
    "vllm.model_executor.model_loader.reload.layerwise": (
        "initialize_layerwise_reload", "get_layerwise_info",
        "_copy_and_restore_kernel_tensors", "_place_kernel_tensors",
    ),
    "vllm.model_executor.layers.attention": ("is_deferred_attention_layer",),
    "vllm.model_executor.model_loader.reload.meta": ("restore_layer_on_meta", "materialize_layer"),
    "vllm.model_executor.model_loader.reload.utils": ("get_layer_params_buffers", "get_layer_tensors"),
}  # fmt: skip


def check_layout() -> None:
    """Raises RuntimeError where this vLLM lacks one of PRIVATE_NAMES."""
    import vllm

    missing = defaultdict(list)
    for module_name, names in PRIVATE_NAMES.items():
        try:
            module = importlib.import_module(module_name)
        except ImportError:
            missing[module_name] = list(names)
            continue
        missing[module_name] = [name for name in names if not hasattr(module, name)]
    faults = [f"{module}.{name}" for module, names in missing.items() for name in names]
    if faults:
        raise RuntimeError(
            f"vLLM {vllm.__version__} lacks {', '.join(faults)}. fura_rl reads vLLM {VLLM_VERSIONS_READ}: install that "
            "version, or bring the files fura_rl/sync/vllm_*.py up to the new layout"
        )


@contextmanager
def keeping_classes(*models: nn.Module) -> Iterator[None]:
    """The classes of `models` serve them on, and others to be made, after an engine is built in this process.

    For an architecture that it does not have itself (OLMo 2 and 3, SmolLM3, Starcoder2) vLLM takes transformers' model
    and rewrites its class for torch.compile (`compilation/decorators.py`): a policy of that class would be asked for
    attributes that only the engine's model has, and another one could not be made.
    """
    before = {type(module): type(module).__init__ for model in models for module in model.modules()}
    try:
        yield
    finally:
        for cls, init in before.items():
            if cls.__init__ is not init:
                cls.__init__, cls.do_not_compile = init, True  # the engine's model has the latter of its own
