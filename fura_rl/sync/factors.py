"""What an adapter does to one weight, in small tensors, and how those fold into any slice of the weight.

A `Factors` is a rule and its tensors; the rule turns a slice of the pristine base weight into the same slice of the
adapted one, out of place.  The trainer folds with these rules in process, an engine's worker folds with them from its
own checkpoint, and the audit folds the few rows it looks at: there is one fold.  Knows neither PEFT nor vLLM.

Notation: W (out, in) the pristine base weight, W' the adapted one.  Of a stack of experts (experts, out, in) W has the
rows of one expert after another: (experts * out, in).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from fura_rl.adapters.blocks import adds_identity, as_factors
from fura_rl.sync.rounding import round_weight

Span = tuple[int, int]  # a half-open range of rows or columns
Read = Callable[[Span, Span], torch.Tensor]  # a slice of W by (rows, columns), in the base's own dtype

# Of a weight in 32 bits on a CPU, so many bytes are folded at once: few enough products to wait for each, and a
# product small enough to be added while it is in cache (measured; a smaller or larger piece is up to a fifth slower).
CPU_PIECE_BYTES = 2 * 2**20


@dataclass(frozen=True)
class Factors:
    """One adapted weight as `rule` and the rule's `tensors`; see `RULES` for names and shapes."""

    rule: str
    tensors: Mapping[str, torch.Tensor]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def to_device(self, device: torch.device) -> Factors:
        return Factors(self.rule, {name: tensor.to(device) for name, tensor in self.tensors.items()})


@dataclass(frozen=True)
class Rule:
    """`fold(base, tensors, rows, columns, out)` writes W'[rows, columns] into `out`.

    `widen(tensors, rows, columns)` are the rows and columns of W that it needs, which are the ones that `base` holds.
    `fold` writes in the dtype of `out`, and accumulates in float32 or wider.  Where `base`, `tensors` and `out` have a
    dimension in front, it folds so many weights at once, in all columns.  `by_row` names the tensors with a row for
    every row of W; None where a row of W' takes more than the same row of W.
    """

    names: tuple[str, ...]
    widen: Callable[[Mapping[str, torch.Tensor], Span, Span], tuple[Span, Span]]
    fold: Callable[[torch.Tensor, Mapping[str, torch.Tensor], Span, Span, torch.Tensor], None]
    by_row: tuple[str, ...] | None


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a tensor of `shape` as the fold sees it; a vector has one column."""
    return (shape[0], 1) if len(shape) == 1 else (math.prod(shape[:-1]), shape[-1])


def as_matrix(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, or of a stack of experts the rows of one after another."""
    return tensor.flatten(0, -2) if tensor.ndim > 2 else tensor


def fold_slice(
    read: Read,
    factors: Factors,
    rows: Span,
    columns: Span,
    out: torch.Tensor,
    generator: torch.Generator | None = None,
) -> None:
    """Write W'[rows, columns] into `out` (rows, columns), rounded once to its dtype.

    A slice of the base in the dtype of `out` is folded in that dtype, with float32 accumulation inside the product;
    any other is folded in float32.  With a `generator` the one rounding is stochastic.
    """
    rule = RULES[factors.rule]
    base = None if factors.rule == "dense" else read(*rule.widen(factors.tensors, rows, columns))
    rounds_apart = generator is not None and out.dtype.itemsize == 2
    if not rounds_apart and (base is None or base.dtype == out.dtype):
        rule.fold(base, factors.tensors, rows, columns, out)
        return
    wide = torch.promote_types(torch.float32, out.dtype)
    exact = torch.empty(out.shape, dtype=wide, device=out.device)
    rule.fold(None if base is None else base.to(wide), factors.tensors, rows, columns, exact)
    out.copy_(round_weight(exact, out.dtype, generator) if rounds_apart else exact)


@functools.lru_cache(maxsize=256)
def row_index(spans: tuple[Span, ...], device: torch.device) -> torch.Tensor:
    """The rows of `spans`, one span after another; to be read only."""
    return torch.cat([torch.arange(*span) for span in spans]).to(device)


def cut_to_rows(read: Read | None, factors: Factors, spans: tuple[Span, ...], columns: int) -> Factors:
    """What folds the rows `spans` of W, one span after another, and nothing else.

    Where a rule needs further rows, `read` is asked for them, and the rows come back folded, in float32 or wider.
    """
    by_row = RULES[factors.rule].by_row
    if by_row is not None:
        cut = {name: t[row_index(spans, t.device)] if name in by_row else t for name, t in factors.tensors.items()}
        return Factors(factors.rule, cut)
    some = next(iter(factors.tensors.values()))
    dtype = torch.promote_types(some.dtype, torch.float32)
    folded = torch.empty(sum(last - first for first, last in spans), columns, dtype=dtype, device=some.device)
    for span, part in zip(spans, folded.split([last - first for first, last in spans]), strict=True):
        fold_slice(read, factors, span, (0, columns), part)
    return Factors("dense", {"weight": folded})


def in_pieces(base: torch.Tensor, out: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Both of them some rows at a time, on a CPU as many as CPU_PIECE_BYTES of `base` have."""
    on_cpu = base.device.type == "cpu"
    rows = max(1, CPU_PIECE_BYTES // (base.shape[-1] * base.itemsize)) if on_cpu else base.shape[-2]
    return zip(base.split(rows, dim=-2), out.split(rows, dim=-2), strict=True)


def stacked(several: Sequence[Factors]) -> Factors:
    """Factors of one rule and of equal shapes, to be folded at once."""
    names = several[0].tensors
    return Factors(several[0].rule, {name: torch.stack([one.tensors[name] for one in several]) for name in names})


def _same(tensors: Mapping[str, torch.Tensor], rows: Span, columns: Span) -> tuple[Span, Span]:
    return rows, columns


def _cut(span: Span, width: int) -> Span:
    """`span` widened to whole blocks of `width`."""
    return span[0] // width * width, -(-span[1] // width) * width


def _fold_dense(base: None, tensors: Mapping[str, torch.Tensor], rows: Span, columns: Span, out: torch.Tensor) -> None:
    weight = tensors["weight"]
    out.copy_(weight[slice(*rows)] if weight.ndim == 1 else weight[..., slice(*rows), slice(*columns)])


def _widen_columns(tensors: Mapping[str, torch.Tensor], rows: Span, columns: Span) -> tuple[Span, Span]:
    return rows, _cut(columns, tensors["update"].shape[-1])


def _fold_block_columns(
    base: torch.Tensor, tensors: Mapping[str, torch.Tensor], rows: Span, columns: Span, out: torch.Tensor
) -> None:
    """W'_i = W_i + W_i D_i; only the blocks that the columns touch."""
    update = tensors["update"]
    wide = _cut(columns, update.shape[-1])
    blocks = slice(wide[0] // update.shape[-1], wide[1] // update.shape[-1])
    _add_block_product(base, update[..., blocks, :, :], out, wide, columns)


def _widen_rows(tensors: Mapping[str, torch.Tensor], rows: Span, columns: Span) -> tuple[Span, Span]:
    return _cut(rows, tensors["update"].shape[-1]), columns


def _fold_block_rows(
    base: torch.Tensor, tensors: Mapping[str, torch.Tensor], rows: Span, columns: Span, out: torch.Tensor
) -> None:
    """W'_j = W_j + D_j^T W_j: block columns of the transposed weight."""
    update = tensors["update"]
    wide = _cut(rows, update.shape[-1])
    folded = torch.empty_like(base.mT, memory_format=torch.contiguous_format)
    blocks = update[wide[0] // update.shape[-1] : wide[1] // update.shape[-1]]
    _add_block_product(base.mT.contiguous(), blocks, folded, wide, wide)
    out.copy_(folded.mT[rows[0] - wide[0] : rows[1] - wide[0]])


def _add_block_product(base: torch.Tensor, update: torch.Tensor, out: torch.Tensor, wide: Span, columns: Span) -> None:
    """out = (base + base blockdiag(update)), cut from the columns `wide` that base holds to `columns`."""
    update = update.to(base.dtype)
    n, b = update.shape[-3:-1]
    by_columns = out.stride(-2) == 1 != out.stride(-1)
    if by_columns and adds_identity(base) and out.dtype == base.dtype and wide == columns:
        _write_row_block_product(base.mT, as_factors(update, base).mT, out.mT)
        return
    whole = out if wide == columns and out.stride(-1) == 1 and out.dtype == base.dtype else torch.empty_like(base)
    if base.ndim > 2 or (base.device.type == "cpu" and base.dtype.itemsize > 2):
        # one batched product per piece: `baddbmm` into a strided tensor is a product per block, and a wait for each
        for part, target in in_pieces(base, whole):
            columns_of_part = part.unflatten(-1, (n, b))
            product = torch.matmul(columns_of_part.transpose(-3, -2), update).transpose(-3, -2)
            torch.add(columns_of_part, product, out=target.unflatten(-1, (n, b)))
    else:
        whole.copy_(base)
        blocks = whole.unflatten(1, (n, b)).transpose(0, 1)
        blocks.baddbmm_(base.unflatten(1, (n, b)).transpose(0, 1), update)
    if whole is not out:
        out.copy_(whole[:, columns[0] - wide[0] : columns[1] - wide[0]])


def _write_row_block_product(base: torch.Tensor, matrices: torch.Tensor, out: torch.Tensor) -> None:
    """out_i = matrices_i base_i for row blocks i of `base` and `out`, written by the one batched product itself."""
    n, b, _ = matrices.shape
    torch.bmm(matrices, base.unflatten(0, (n, b)), out=out.unflatten(0, (n, b)))


def _fold_low_rank(
    base: torch.Tensor, tensors: Mapping[str, torch.Tensor], rows: Span, columns: Span, out: torch.Tensor
) -> None:
    """W' = W + up down."""
    up, down = _low_rank_slice(tensors, rows, columns, base.dtype)
    if out.dtype == base.dtype and out.is_contiguous():
        _add_product(base, up, down, out=out)
    else:
        out.copy_(_add_product(base, up, down))


def _fold_stacked_low_rank(
    base: torch.Tensor, tensors: Mapping[str, torch.Tensor], rows: Span, columns: Span, out: torch.Tensor
) -> None:
    """W'_e = W_e + up_e down_e; only the experts that the rows touch."""
    size = tensors["up"].shape[1]
    for expert in range(rows[0] // size, -(-rows[1] // size)):
        first, last = max(rows[0], expert * size), min(rows[1], (expert + 1) * size)
        here = slice(first - rows[0], last - rows[0])
        own = {part: tensor[expert] for part, tensor in tensors.items()}
        _fold_low_rank(base[here], own, (first - expert * size, last - expert * size), columns, out[here])


def _fold_scaled_low_rank(
    base: torch.Tensor, tensors: Mapping[str, torch.Tensor], rows: Span, columns: Span, out: torch.Tensor
) -> None:
    """W' = diag(scale) (W + up down); the trainer computes `scale`, so that no shard needs a norm over whole rows."""
    wide = torch.promote_types(base.dtype, torch.float32)
    up, down = _low_rank_slice(tensors, rows, columns, wide)
    out.copy_(_add_product(base.to(wide), up, down).mul_(tensors["scale"][..., slice(*rows), None].to(wide)))


def _fold_hadamard(
    base: torch.Tensor, tensors: Mapping[str, torch.Tensor], rows: Span, columns: Span, out: torch.Tensor
) -> None:
    """W' = W + W * (up down), entry by entry."""
    wide = torch.promote_types(base.dtype, torch.float32)
    up, down = _low_rank_slice(tensors, rows, columns, wide)
    out.copy_(torch.addcmul(base.to(wide), base.to(wide), up @ down))


def _low_rank_slice(
    tensors: Mapping[str, torch.Tensor], rows: Span, columns: Span, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    return tensors["up"][..., slice(*rows), :].to(dtype), tensors["down"][..., slice(*columns)].to(dtype)


def _add_product(
    base: torch.Tensor, up: torch.Tensor, down: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    return (torch.addmm if base.ndim == 2 else torch.baddbmm)(base, up, down, out=out)


RULES: dict[str, Rule] = {
    # the weight itself, a matrix or a vector: full fine-tuning, and methods without a small form
    "dense": Rule(("weight",), _same, _fold_dense, ("weight",)),
    # update (n, b, b): FuRA on column blocks (base-relative D), OFT
    "block_columns": Rule(("update",), _widen_columns, _fold_block_columns, ()),
    # update (n, b, b): FuRA on row blocks
    "block_rows": Rule(("update",), _widen_rows, _fold_block_rows, None),
    # up (out, r), down (r, in): LoRA, rsLoRA, PiSSA, OLoRA
    "low_rank": Rule(("up", "down"), _same, _fold_low_rank, ("up",)),
    # up (experts, out, r), down (experts, r, in): LoRA of a stack of experts
    "stacked_low_rank": Rule(("up", "down"), _same, _fold_stacked_low_rank, None),
    # as low_rank, and scale (out,): DoRA
    "scaled_low_rank": Rule(("up", "down", "scale"), _same, _fold_scaled_low_rank, ("up", "scale")),
    # up (out, r), down (r, in): HiRA
    "hadamard": Rule(("up", "down"), _same, _fold_hadamard, ("up",)),
}
