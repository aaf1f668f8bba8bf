"""A policy whose parameters are cut up over processes: whole tensors, the rows held here, failing together.

FSDP2's parameters are DTensors, ZeRO-3's carry `ds_*` attributes.  Gathering is a collective: every process of the
trainer must take part, in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from fura_rl.sync.factors import Span


class PeerFailedError(RuntimeError):
    """Another process of this trainer failed; its own error is the one to read."""


def is_piece(tensor: torch.Tensor) -> bool:
    """Whether this process holds only a part of `tensor`."""
    return isinstance(tensor, DTensor) or hasattr(tensor, "ds_id")


def is_cut_by_rows(tensor: torch.Tensor) -> bool:
    """Whether the pieces of `tensor` are rows of it, of which each process knows which it holds."""
    return isinstance(tensor, DTensor) and any(placement == Shard(0) for placement in tensor.placements)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor, without gradient: gathered from the pieces, the same storage where there are none."""
    if hasattr(tensor, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """The full tensor's shape, without a gather."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


@contextmanager
def gathered(layer: nn.Module, but: nn.Module | None = None) -> Iterator[None]:
    """Every parameter of `layer` whole and in its place meanwhile, except those of its submodule `but`.

    Collective.  What is written to a gathered parameter is lost.
    """
    left_alone = set(but.modules()) if but is not None else set()
    pieces = [
        (module, name, parameter)
        for module in layer.modules()
        if module not in left_alone
        for name, parameter in module._parameters.items()
        if parameter is not None and is_piece(parameter)
    ]
    try:
        for module, name, parameter in pieces:
            module._parameters[name] = nn.Parameter(whole(parameter), requires_grad=parameter.requires_grad)
        yield
    finally:
        for module, name, parameter in pieces:
            module._parameters[name] = parameter


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of it."""
    tensor = getattr(tensor, "ds_tensor", tensor).detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_rows(tensor: torch.Tensor) -> Span:
    """The rows that this process holds, without a gather; none of them where the tensor is cut otherwise."""
    if not isinstance(tensor, DTensor):
        return (0, 0) if hasattr(tensor, "ds_id") else (0, tensor.shape[0])
    cut = [i for i, placement in enumerate(tensor.placements) if placement != Replicate()]
    if not cut:
        return 0, tensor.shape[0]
    if len(cut) > 1 or tensor.placements[cut[0]] != Shard(0):
        return 0, 0
    mesh = tensor.device_mesh
    first = min(mesh.get_local_rank(cut[0]) * -(-tensor.shape[0] // mesh.size(cut[0])), tensor.shape[0])
    return first, first + tensor.to_local().shape[0]


def by_rows(tensor: torch.Tensor, compute: Callable[[torch.Tensor, Span], torch.Tensor]) -> torch.Tensor:
    """One value (rows,) for every row of `tensor`: `compute(piece, span)` of the rows held here, then gathered.

    Only the values, in float32, cross where the tensor is cut by rows, else the tensor itself.  Collective for a
    sharded one: a process in which `compute` fails takes part in the gather, where the others wait for it, with a mark
    beside every value that it owes.

    Raises:
        PeerFailedError: where `compute` failed in another process.
    """
    if not is_cut_by_rows(tensor):
        return compute(whole(tensor), (0, whole_shape(tensor)[0]))
    piece = local(tensor)
    marked = torch.zeros(piece.shape[0], 2, device=piece.device)
    failure: Exception | None = None
    try:
        marked[:, 0] = compute(piece, local_rows(tensor))
    except Exception as error:
        failure, marked[:, 1] = error, 1.0
    shape = torch.Size([tensor.shape[0], 2])
    pieces = DTensor.from_local(marked, tensor.device_mesh, tensor.placements, shape=shape, stride=(2, 1))
    values, owed = pieces.full_tensor().unbind(1)
    if failure is not None:
        raise failure
    if owed.any():
        raise PeerFailedError("another process of the trainer could not compute its rows")
    return values


def several_processes() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def of_every_process(value: Any) -> list[Any]:
    """`value` of each process, in their order.  Collective."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def decided_by_the_first(decide: Callable[[], Any]) -> Any:
    """What `decide` says in the first process, in all of them; the others do not ask their own.  Collective."""
    if not several_processes():
        return decide()
    return of_every_process(decide() if dist.get_rank() == 0 else None)[0]


def in_any_process(value: bool) -> bool:
    """Whether it is so in one process at least, said in all of them.  Collective."""
    return any(of_every_process(value)) if several_processes() else value


@contextmanager
def failing_together() -> Iterator[None]:
    """Where one process fails in here, all of them do: nobody waits in a collective that the other never enters.

    Raises:
        PeerFailedError: where another process failed, with its words.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    if several_processes():
        heard = isinstance(failure, PeerFailedError)  # of a failure for which another process has the words
        own = None if failure is None else (heard, dist.get_rank(), f"{type(failure).__name__}: {failure}")
        failed = [one for one in of_every_process(own) if one is not None]
        if failed and (failure is None or heard):
            _, rank, words = min(failed)
            raise PeerFailedError(f"process {rank} of the trainer failed: {words}")
    if failure is not None:
        raise failure
