"""What the sync imports of vLLM's insides, and the version that was read in: 0.31.0, CPU and CUDA sources.

`check_layout` looks for all of it, so that an upgrade that moves one ends with a message and not with stale weights.
Only the files vllm_*.py touch vLLM's insides.
"""

from __future__ import annotations

import importlib
from collections import defaultdict

VLLM_VERSIONS_READ = "0.31"

PRIVATE_NAMES = {
    "vllm.distributed.weight_transfer.sharded_rdt_fake": ("BakeSink", "FakeRDTTensor"),
    "vllm.distributed.weight_transfer.sharded_rdt_engine": ("ShardedRDTWeightTransferEngine",),
    "vllm.model_executor.model_loader.reload.layerwise": (
        "initialize_layerwise_reload", "get_layerwise_info",
        "_copy_and_restore_kernel_tensors", "_place_kernel_tensors",
    ),
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
