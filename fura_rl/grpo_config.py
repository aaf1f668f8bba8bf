"""`FuraGRPOConfig`: TRL's GRPOConfig and the settings of engine, sync and alarms that TRL has no field for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trl import GRPOConfig

from fura_rl.alarms import AlarmSettings
from fura_rl.redaction import redacted


@dataclass
class FuraGRPOConfig(AlarmSettings, GRPOConfig):
    """Arguments of `FuraGRPOTrainer`; every TRL field keeps its name and, but for one, its default."""

    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "Not set or 'latest': go on from the newest whole checkpoint of output_dir, if there is one; "
            "'true': there must be one; a folder: go on from that one, also with other settings."
        },
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={"help": "Log a loss that is not finite as 0, as transformers does by default; here it is an alarm."},
    )
    vllm_dtype: str | None = field(
        default=None,
        metadata={"help": "dtype of the rollout engine; default: the dtype that the policy computes in."},
    )
    vllm_enforce_eager: bool | None = field(
        default=None,
        metadata={"help": "Run the engine without graph capture and compilation; default: only on CPU."},
    )
    vllm_share_weights: bool = field(
        default=False,
        metadata={
            "help": "With vllm_mode colocate: policy and engine hold the base weights once, in the engine's storage. "
            "Saves the model's size in GPU memory, for one copy of the adapted ones from host memory a rollout. "
            "Policy and engine must have one dtype; not with sleep mode, tensor parallelism or full fine-tuning."
        },
    )
    vllm_server_seeded: bool = field(
        default=False,
        metadata={
            "help": "Ask a rollout server for each prompt with a seed of its own: rollouts are then a function of "
            "seed, step and weights, and a killed run goes on to the same numbers. vLLM draws such rows one by one, "
            "slower on a GPU; its CPU engine refuses a seeded prompt that it prefills in chunks."
        },
    )
    sync_mode: str = field(
        default="auto",
        metadata={
            "help": "What a weight sync sends: factored (small adapter tensors, folded where the engine is), dense "
            "(whole weights), or auto (factored where the method has a small form).",
            "choices": ["auto", "dense", "factored"],
        },
    )
    sync_transport: str = field(
        default="auto",
        metadata={
            "help": "How a sync reaches a rollout server: file (memory shared on one host), inline (in the request), "
            "or auto (a file where the server's address is loopback).",
            "choices": ["auto", "file", "inline"],
        },
    )
    sync_probe_every: int = field(
        default=10, metadata={"help": "Prove every N-th weight sync with a probe prompt; the first is always proved."}
    )
    sync_probe_tolerance: float | None = field(
        default=None,
        metadata={"help": "Largest accepted probe gap in nats; default: 1e-3 float32, 0.1 float16, 0.5 bfloat16."},
    )
    sync_audit_every: int | None = field(
        default=None,
        metadata={
            "help": "Audit every live kernel of the engine at every N-th weight sync, module by module; 0: never; "
            "default: at the first, then as often as audits take no more than a twentieth of the time of rollouts, and "
            "at every sync where one takes under 0.25 s. So timing decides on some log entries, never on weights."
        },
    )
    fold_rounding: str = field(
        default="nearest",
        metadata={
            "help": "How folded weights are rounded to a 16-bit engine: nearest, or stochastic (seeded, unbiased), "
            "which delivers updates too small for the engine's dtype on average, with noise.",
            "choices": ["nearest", "stochastic"],
        },
    )

    def __getstate__(self) -> dict[str, Any]:
        """Without secrets: transformers pickles the arguments into every checkpoint, `hub_token` in clear."""
        return redacted(vars(self))
