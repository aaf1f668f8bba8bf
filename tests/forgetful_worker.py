"""A fault for test_engine_process.py, run in the engine: one worker that acknowledges every sync and writes none."""

from typing import Any

from fura_rl.sync.vllm_backend import FactoredSyncExtension


class ForgetfulWorker(FactoredSyncExtension):
    def forget_writes(self, rank: int) -> dict[str, Any]:
        """Of the worker of this rank; every other one, and this one from the next call on, writes."""
        live = self.weight_transfer_engine.live
        vars(live).pop("write", None)
        if self.rank == rank:
            live.write = lambda *args: None
        return {}
