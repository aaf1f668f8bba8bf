"""Whole tensors of a policy whose parameters are sharded.  Gathering is a collective: every process must take part."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from fura_rl.sync.factors import Span


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor, without gradient: gathered from FSDP2's or ZeRO-3's shards, the same storage where unsharded."""
    if hasattr(tensor, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of it."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_rows(tensor: torch.Tensor) -> Span:
    """The rows that this process holds, without a gather; none of them where the tensor is cut otherwise."""
    if not isinstance(tensor, DTensor):
        return (0, 0) if hasattr(tensor, "ds_id") else (0, tensor.shape[0])
    if tensor.placements != (Shard(0),):
        return (0, 0)
    first = tensor.device_mesh.get_local_rank() * -(-tensor.shape[0] // tensor.device_mesh.size())
    return first, first + tensor.to_local().shape[0]


def is_sharded(model: nn.Module) -> bool:
    """Whether any parameter lives in pieces on several processes."""
    return any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in model.parameters())
