"""Factors on the wire: safetensors chunks with a checksum.  No pickle, nothing executable."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from safetensors.torch import load, save
from xxhash import xxh3_64_intdigest as checksum_of  # four times as fast as a CRC: whole weights are gigabytes

from fura_rl.finite import all_finite
from fura_rl.sync.factors import RULES, Factors, matrix_shape

# glibc maps a buffer of 32 MiB afresh each time, and to fill its new pages takes longer than the copy: smaller chunks
# are encoded in half the time and decoded in a fifth of it (measured on a CPU)
CHUNK_BYTES = 16 * 2**20
SEPARATOR = "|"  # between tensor name, rule and the rule's own name; no checkpoint tensor has it


class PayloadError(ValueError):
    """A payload that must not reach a live weight."""


@dataclass(frozen=True)
class Chunk:
    """Part of one version: safetensors bytes and their checksum."""

    data: bytes
    checksum: int


def encode(updates: Mapping[str, Factors], engine_dtype: torch.dtype) -> Iterator[Chunk]:
    """`updates` in chunks of about CHUNK_BYTES, each made when it is asked for; of the one before nothing is held."""
    packed: dict[str, torch.Tensor] = {}
    size = 0
    for name in updates:
        factors = updates[name]
        for part, tensor in factors.tensors.items():
            tensor = tensor.detach().to("cpu", wire_dtype(factors.rule, tensor, engine_dtype)).contiguous()
            packed[SEPARATOR.join((name, factors.rule, part))] = tensor
            size += tensor.nbytes
        if size >= CHUNK_BYTES:
            del factors, tensor
            yield make_chunk(packed)
            size = 0
    if packed:
        yield make_chunk(packed)


def wire_dtype(rule: str, tensor: torch.Tensor, engine_dtype: torch.dtype) -> torch.dtype:
    """A whole weight in the engine's dtype; matrices of factors in bfloat16 for a 16-bit engine, else float32.

    Updates are small differences, so bfloat16 keeps them to 0.4% whatever their size, where float16 would lose those
    below 6e-8; row scales are near 1 and stay in float32.
    """
    if rule == "dense":
        return engine_dtype
    return torch.bfloat16 if engine_dtype.itemsize == 2 and tensor.ndim > 1 else torch.float32


def make_chunk(tensors: dict[str, torch.Tensor]) -> Chunk:
    """`tensors` as bytes; empties the dict, since whoever asks for a chunk goes on holding it for a while."""
    data = save(tensors)
    tensors.clear()
    return Chunk(data, checksum_of(data))


def decode(data: bytes, checksum: int) -> dict[str, Factors]:
    """The factors of one chunk.

    Raises:
        PayloadError: where the checksum differs, or an entry is no tensor of a known rule.
    """
    if checksum_of(data) != checksum:
        raise PayloadError("the payload was damaged on its way: its checksum differs; send it again")
    parts: dict[str, tuple[str, dict[str, torch.Tensor]]] = {}
    for key, tensor in load(data).items():
        name, _, rest = key.partition(SEPARATOR)
        rule, _, part = rest.partition(SEPARATOR)
        if rule not in RULES or part not in RULES[rule].names:
            raise PayloadError(f"the payload holds {key!r}, which no fold rule of this version knows")
        parts.setdefault(name, (rule, {}))[1][part] = tensor
    return {name: Factors(rule, tensors) for name, (rule, tensors) in parts.items()}


def check(updates: Mapping[str, Factors], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Every tensor complete, of the right shape for its weight, and finite.

    Raises:
        PayloadError: with the first names of those that are not.
    """
    faults = [f"{name}: {fault}" for name, factors in updates.items() if (fault := fault_of(name, factors, shapes))]
    if faults:
        raise PayloadError(f"{len(faults)} of {len(updates)} weights were refused: {'; '.join(faults[:4])}")


def fault_of(name: str, factors: Factors, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    tensors = factors.tensors
    if missing := set(RULES[factors.rule].names) - set(tensors):
        return f"{', '.join(sorted(missing))} missing"
    if name not in shapes:
        return "not one of the policy's tensors"
    shape = shapes[name]
    if factors.rule != "dense" and (factors.rule == "stacked_low_rank") != (len(shape) == 3):
        return f"{factors.rule} does not fold a weight of {shape}"
    weight = shape if len(shape) == 1 else matrix_shape(shape)
    wanted: dict[str, tuple[int, ...]] = {"weight": weight, "scale": shape[:1]}
    if "up" in tensors:
        rank = tensors["up"].shape[-1]
        experts = shape[:-2]  # of a matrix none
        wanted |= {"up": (*shape[:-1], rank), "down": (*experts, rank, shape[-1])}
    if "update" in tensors:
        cut = shape[1] if factors.rule == "block_columns" else shape[0]
        size = tensors["update"].shape[-1]
        wanted["update"] = (cut // max(size, 1), size, size)
    for part, tensor in tensors.items():
        if tuple(tensor.shape) != wanted[part] or (part == "update" and wanted[part][0] * wanted[part][1] != cut):
            return f"{part} is {tuple(tensor.shape)}, which does not fit a weight of {shape}"
        if not all_finite([tensor]):
            return f"{part} is not finite"
    return None
