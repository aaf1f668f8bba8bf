"""Telemetry of the libraries underneath is off, unless the environment says otherwise.  This project sends nothing.

`fura_rl` calls this before it imports any of them, since they read these variables once.  A variable that is set keeps
its value: VLLM_NO_USAGE_STATS=0 turns vLLM's statistics on again.
"""

from __future__ import annotations

import os

OFF = {
    "DO_NOT_TRACK": "1",  # vLLM, Hugging Face and others
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",  # vLLM over several nodes
    "WANDB_ERROR_REPORTING": "false",  # crash reports, not what report_to=wandb logs
    "GRADIO_ANALYTICS_ENABLED": "False",  # trackio's dashboard
}


def turn_off() -> None:
    for name, value in OFF.items():
        os.environ.setdefault(name, value)
