"""Whole tensors of a policy whose parameters are sharded.  Gathering is a collective: every process must take part."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import DTensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor, without gradient: gathered from FSDP2's or ZeRO-3's shards, the same storage where unsharded."""
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    return tensor


def is_sharded(model: nn.Module) -> bool:
    """Whether any parameter lives in pieces on several processes."""
    return any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in model.parameters())
