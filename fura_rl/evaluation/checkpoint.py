"""From what a user names (model, hub id, adapter checkpoint) to a plain checkpoint that vLLM can serve."""

from __future__ import annotations

from pathlib import Path

from fura_rl.config import resolve_model


def servable_checkpoint(name: str, base_model: str | None, scratch: Path) -> str:
    """A folder or hub id of a plain model; an adapter checkpoint is folded into its base and written to `scratch`.

    Raises:
        ValueError: where nothing is there, or an adapter's base model is not to be found or is another one.
    """
    from fura_rl.export import base_of, fold_checkpoint, is_adapter

    if not is_adapter(name):
        if base_model:
            raise ValueError(
                f"--base_model is set, but {name!r} is no adapter checkpoint (it has no adapter_config.json)"
            )
        return resolve_model(name)
    base, recorded = base_of(name, base_model)
    quantization = recorded["quantization"] if recorded else None
    return str(fold_checkpoint(name, base, quantization, scratch, "auto"))
