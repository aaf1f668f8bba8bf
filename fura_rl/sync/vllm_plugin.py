"""How vLLM finds the factored weight-transfer backend: the entry point `vllm.general_plugins`, run in every process.

    vllm serve MODEL --weight-transfer-config '{"backend": "factored"}' \\
        --worker-extension-cls fura_rl.sync.vllm_backend.FactoredSyncExtension

Light on purpose: it is imported by every vLLM process, whether or not it syncs.
"""

from __future__ import annotations

BACKEND = "factored"
BACKEND_MODULE = "fura_rl.sync.vllm_backend"
EXTENSION = f"{BACKEND_MODULE}.FactoredSyncExtension"


def register() -> None:
    """Make vLLM know the backend; harmless when called twice."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    try:
        WeightTransferEngineFactory.register_engine(BACKEND, BACKEND_MODULE, "FactoredWeightTransferEngine")
    except ValueError as error:
        if "already registered" not in str(error):
            raise
