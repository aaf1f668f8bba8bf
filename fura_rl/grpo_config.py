"""`FuraGRPOConfig`: TRL's GRPOConfig and the settings of engine and sync that TRL has no field for."""

from __future__ import annotations

from dataclasses import dataclass, field

from trl import GRPOConfig


@dataclass
class FuraGRPOConfig(GRPOConfig):
    """Arguments of `FuraGRPOTrainer`; every TRL field keeps its name and default."""

    vllm_dtype: str | None = field(
        default=None,
        metadata={"help": "dtype of the rollout engine; default: the dtype that the policy computes in."},
    )
    vllm_enforce_eager: bool | None = field(
        default=None,
        metadata={"help": "Run the engine without graph capture and compilation; default: only on CPU."},
    )
    sync_probe_every: int = field(
        default=1, metadata={"help": "Prove every N-th weight sync with a probe prompt; the first is always proved."}
    )
    sync_probe_tolerance: float | None = field(
        default=None,
        metadata={"help": "Largest accepted probe gap in nats; default: 1e-3 float32, 0.1 float16, 0.5 bfloat16."},
    )
    sync_audit_every: int = field(
        default=1,
        metadata={
            "help": "Audit every live kernel of the engine at every N-th weight sync, module by module; 0: never."
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
