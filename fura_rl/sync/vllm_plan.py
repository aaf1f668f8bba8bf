"""Where each checkpoint tensor lands in a live vLLM model: fused qkv and gate_up, shards, replicated heads, experts.

That is not written down here: vLLM's own weight loaders are run once over tensors without storage, and what they copy
is recorded.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from fura_rl.sync.factors import Span, matrix_shape

if TYPE_CHECKING:
    from fura_rl.sync.vllm_model import LiveModel


@dataclass(frozen=True)
class Region:
    """Part of one checkpoint tensor as it lies in one parameter of the engine, in checkpoint layout.

    `name[rows, columns]` (transposed where `transposed`) is the strided region of the parameter at `offset`.  A vector
    has columns (0, 1), a stack of experts the rows of one after another.  Where the loader has put rows in another
    order (GPT-NeoX's and Bloom's q, k and v, head by head in the checkpoint), `rows` are all of them, and `row_order`
    says which of them lies in each row of the region.  Where it cuts no rectangle out of a tensor of more dimensions
    (`tensor_shape`), `rows` and `columns` are all of them, and `ops` are the slices that it cuts.
    """

    name: str
    rows: Span
    columns: Span
    total_columns: int
    transposed: bool
    parameter: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    ops: tuple = ()
    tensor_shape: tuple[int, ...] = ()
    row_order: tuple[int, ...] | None = None

    @property
    def element_count(self) -> int:
        return math.prod(self.shape)

    def within(self, name: str, first_row: int) -> Region:
        """Of its tensor as the rows from `first_row` on of the tensor `name`."""
        first, last = self.rows
        return self if name == self.name else replace(self, name=name, rows=(first + first_row, last + first_row))

    def view(self, parameter: torch.Tensor) -> torch.Tensor:
        """The region of `parameter`, the checkpoint tensor's rows first: (rows, columns), or (rows,) of a vector."""
        data = parameter.data  # a plain tensor: vLLM's parameters take ten times as long for each of these steps
        if lies_column_by_column(data) and self.stride[-1] == 1:  # written so by us, but planned row by row
            first_row, first_column = divmod(self.offset, data.shape[1])
            rows, columns = self.shape
            return data[first_row : first_row + rows, first_column : first_column + columns]
        region = data.as_strided(self.shape, self.stride, self.offset)
        return region.mT if self.transposed else region


def lies_column_by_column(parameter: torch.Tensor) -> bool:
    return parameter.ndim == 2 and not parameter.is_contiguous() and parameter.mT.is_contiguous()


def dry_run(live: LiveModel, tensors: Mapping[str, tuple[int, ...]]) -> list[Any]:
    """vLLM's record of every copy that loading `tensors` would make; the model is left as it was.

    Raises:
        NotImplementedError: where the model's loader does not take them.
    """
    from vllm.distributed.weight_transfer.sharded_rdt_engine import ShardedRDTWeightTransferEngine as Recorder
    from vllm.distributed.weight_transfer.sharded_rdt_fake import BakeSink, FakeRDTTensor
    from vllm.model_executor.model_loader.reload.layerwise import initialize_layerwise_reload

    sink = BakeSink()
    with live.context(), torch.device(live.device):
        initialize_layerwise_reload(live.model)
        try:
            Recorder._install_recording_stamps(None, live.model, sink)
            live.model.load_weights(
                (name, FakeRDTTensor(name, torch.Size(shape), live.dtype, live.device, sink=sink))
                for name, shape in tensors.items()
            )
        except Exception as error:
            raise NotImplementedError(
                f"vLLM's {type(live.model).__name__} does not take the tensors of this policy: {error}. transformers "
                "holds its weights in another form than its checkpoint, one that vLLM's loader of the model does not "
                "know: train another model, or sample with use_vllm=false"
            ) from error
        finally:
            Recorder._restore_after_dry_run(None, live.model)
    return [scatter for scatters in sink.copies_by_layer.values() for scatter in scatters]


def make_region(name: str, shape: tuple[int, ...], ops: tuple, scatter: Any) -> Region:
    """The rectangle of a checkpoint tensor that a chain of slicing ops cuts out.

    The ops are replayed on index tensors: one holds each element's row, one its column, both expanded, so that they
    take no memory.
    """
    rows, columns = (replay(ops, index) for index in indices(shape))
    if (region := plain_region(name, shape, scatter, rows, columns)) is not None:
        return region
    if len(shape) > 2:
        height, width = matrix_shape(shape)
        place = scatter.param_name, scatter.offset, scatter.shape, scatter.stride
        return Region(name, (0, height), (0, width), width, False, *place, ops, shape)
    row_order = order_of_rows(rows, columns)
    if row_order is not None:
        rows = torch.arange(shape[0]).reshape(-1, *[1] * (rows.ndim - 1)).expand(-1, *rows.shape[1:])
    transposed = rows.ndim == 2 and rows.shape[1] > 1 and bool(rows[0, 0] != rows[0, -1])
    region = Region(
        name,
        _span(rows),
        _span(columns),
        shape[1] if len(shape) == 2 else 1,
        transposed,
        scatter.param_name,
        scatter.offset,
        scatter.shape,
        scatter.stride,
        row_order=row_order,
    )
    if (region.rows[1] - region.rows[0]) * (region.columns[1] - region.columns[0]) != rows.numel():
        raise NotImplementedError(f"{name}: vLLM loads a part of it that is not a rectangle")
    return region


@functools.lru_cache(maxsize=16)
def indices(shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column of each element of a tensor of `shape` as a matrix (`factors.as_matrix`), expanded to `shape`."""
    rows, columns = matrix_shape(shape)
    if len(shape) == 1:
        return torch.arange(rows), torch.zeros(1, dtype=torch.long).expand(shape)
    return torch.arange(rows).view(*shape[:-1], 1).expand(shape), torch.arange(columns).expand(shape)


def plain_region(
    name: str, shape: tuple[int, ...], scatter: Any, rows: torch.Tensor, columns: torch.Tensor
) -> Region | None:
    """The region of the elements in these rows and columns, where that is a rectangle, in order, of two dimensions.

    Experts have thousands of them.  So only the strides of the expanded indices are looked at, which are 0 where an
    index does not change.
    """
    if rows.ndim != 2:
        return None
    transposed = rows.stride(0) == 0
    down, across = (rows.mT, columns.mT) if transposed else (rows, columns)
    if (down.stride(1), across.stride(0)) != (0, 0) or not (is_stretch(down[:, 0]) and is_stretch(across[0])):
        return None
    place = scatter.param_name, scatter.offset, scatter.shape, scatter.stride
    return Region(name, _span(rows), _span(columns), shape[-1], transposed, *place)


def is_stretch(index: torch.Tensor) -> bool:
    return bool((index.diff() == 1).all())


def order_of_rows(rows: torch.Tensor, columns: torch.Tensor) -> tuple[int, ...] | None:
    """Which row of a tensor lies in each of a region's, from the row and the column of every element of it.

    None where the region's rows are not such of the tensor, or a stretch of them.
    """
    order = rows.reshape(len(rows), -1)[:, 0]
    along_the_first = bool((rows == order.reshape(-1, *[1] * (rows.ndim - 1))).all() and (columns == columns[:1]).all())
    if not along_the_first or len(order) == 1 or is_stretch(order):
        return None
    return tuple(order.tolist())


def replay(ops: tuple, tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` after the slicing that vLLM's loader did to the checkpoint tensor in its place."""
    for op, arguments, keywords in ops:
        if op != "contiguous":  # it would fill an expanded index with memory
            tensor = getattr(tensor, op)(*arguments, **dict(keywords))
    return tensor


def _span(index: torch.Tensor) -> Span:
    return int(index[(0,) * index.ndim]), int(index[(-1,) * index.ndim]) + 1
