"""A live vLLM model as something to fold weights into.  With `vllm_engine.py`, all that touches vLLM's insides.

Where each checkpoint tensor lands (fused qkv and gate_up, tensor-parallel shards, replicated heads, experts) is not
written down here: vLLM's own weight loaders are run once over tensors without storage, and what they copy is recorded.

Read in vLLM 0.31.0, CPU and CUDA sources.  `check_layout` looks for every private name used here, so that an upgrade
that moves one ends with a message and not with stale weights.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fura_rl.sync import audit
from fura_rl.sync.audit import KernelReply
from fura_rl.sync.factors import Factors, Read, Span, fold_slice, row_index

VLLM_VERSIONS_READ = "0.31"

PROCESSED = "_already_called_process_weights_after_loading"  # vLLM's mark of a module that is quantized already
PRIVATE_NAMES = {
    "vllm.distributed.weight_transfer.sharded_rdt_fake": ("BakeSink", "FakeRDTTensor"),
    "vllm.distributed.weight_transfer.sharded_rdt_engine": ("ShardedRDTWeightTransferEngine",),
    "vllm.model_executor.model_loader.reload.layerwise": (
        "initialize_layerwise_reload", "get_layerwise_info",
        "_copy_and_restore_kernel_tensors", "_place_kernel_tensors",
    ),
    "vllm.model_executor.model_loader.reload.meta": ("restore_layer_on_meta", "materialize_layer"),
    "vllm.model_executor.model_loader.reload.utils": ("get_layer_params_buffers", "get_layer_tensors"),
}  # fmt: skip


@dataclass(frozen=True)
class Region:
    """Part of one checkpoint tensor as it lies in one parameter of the engine, in checkpoint layout.

    `name[rows, columns]` (transposed where `transposed`) is the strided region of the parameter at `offset`.  A vector
    has columns (0, 1).  Of a tensor with more dimensions (stacked experts) `rows` is the whole first one, and `ops` are
    the slices that vLLM's loader cuts out of the tensor.
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

    @property
    def element_count(self) -> int:
        return math.prod(self.shape)

    def view(self, parameter: torch.Tensor) -> torch.Tensor:
        """The region of `parameter`, the checkpoint tensor's rows first: (rows, columns), or (rows,) of a vector."""
        if lies_column_by_column(parameter) and self.stride[-1] == 1:  # written so by us, but planned row by row
            first_row, first_column = divmod(self.offset, parameter.shape[1])
            rows, columns = self.shape
            return parameter.data[first_row : first_row + rows, first_column : first_column + columns]
        region = parameter.data.as_strided(self.shape, self.stride, self.offset)
        return region.mT if self.transposed else region


class PoisonedEngineError(RuntimeError):
    """The engine's weights are torn, so it refuses to generate."""


@dataclass
class LiveModel:
    """The model inside one vLLM worker.

    Args:
        model: the worker's model.
        device: where its weights are.
        dtype: the dtype that unquantized weights are served in.
        context: vLLM's configuration context, in which weights must be processed.
    """

    model: nn.Module
    device: torch.device
    dtype: torch.dtype
    context: Callable[[], Any]
    regions: dict[str, list[Region]] = field(default_factory=dict)  # engine module -> what lies in it
    owners: dict[str, list[str]] = field(default_factory=dict)  # checkpoint tensor -> engine modules that hold it
    poisoned: str | None = None  # why the weights are torn
    torn: set[str] = field(default_factory=set)  # engine modules of which writes that failed have begun to write

    def __post_init__(self) -> None:
        check_layout()
        self.modules = dict(self.model.named_modules())
        self.model.register_forward_pre_hook(self._refuse_while_poisoned)

    def _refuse_while_poisoned(self, *_: Any) -> None:
        if self.poisoned:
            raise PoisonedEngineError(f"this engine refuses to generate: {self.poisoned}; sync it again")

    # ---- the plan

    def record(self, tensors: Mapping[str, tuple[int, ...]]) -> None:
        """Find where each checkpoint tensor (name -> shape) lands, by a dry run of the model's own loaders.

        Raises:
            NotImplementedError: where a loader does more than slice a tensor.
        """
        self.regions, self.owners = {}, {}
        modules_by_id = {id(module): name for name, module in self.modules.items()}
        for scatter in dry_run(self, tensors):
            name, ops = scatter.src
            module = modules_by_id[id(scatter.layer)]
            region = make_region(name, tensors[name], ops, scatter)
            self.regions.setdefault(module, []).append(region)
            owners = self.owners.setdefault(name, [])
            if module not in owners:
                owners.append(module)

    def siblings(self, names: Iterable[str]) -> set[str]:
        """Every checkpoint tensor in the modules that hold `names`: the fused ones, too."""
        modules = {module for name in names for module in self.owners.get(name, ())}
        return {region.name for module in modules for region in self.regions[module]}

    # ---- writing

    def check_places(self, names: Iterable[str]) -> None:
        """Raises KeyError for a tensor that no parameter of the engine takes."""
        if missing := [name for name in names if name not in self.owners]:
            raise KeyError(f"the rollout engine has no place for {', '.join(missing[:8])}")

    @torch.no_grad()
    def write(
        self,
        updates: Mapping[str, Factors],
        read: Callable[[str], Read],
        generator: Callable[[str], torch.Generator | None] = lambda name: None,
    ) -> None:
        """Fold `updates` (by checkpoint name) into the live weights, always from the pristine base.

        `read(name)` reads slices of a base weight, on this model's device.  `generator(name)` draws the stochastic
        rounding of one tensor, None for rounding to nearest.  An exception leaves the engine poisoned: it refuses to
        generate until a write succeeds, which also writes the base's values where a failed one has begun and `updates`
        holds nothing.

        Raises:
            KeyError: for a tensor that no parameter of the engine takes, before anything is written.
        """
        self.check_places(updates)
        torn = frozenset(self.torn)
        by_module = {m: None for name in updates for m in self.owners[name]} | dict.fromkeys(sorted(torn))
        self.poisoned = "a weight sync was interrupted while it wrote"
        with self.context():
            for module_name in by_module:
                self.torn.add(module_name)
                self._write_module(module_name, updates, read, generator, module_name in torn)
            self._repack_tied_head(by_module)
        self.torn.clear()
        self.poisoned = None

    def _write_module(
        self,
        module_name: str,
        updates: Mapping[str, Factors],
        read: Callable[[str], Read],
        generator: Callable[[str], torch.Generator | None],
        torn: bool,
    ) -> None:
        """Write what one module has of `updates`; where it is `torn` or not in checkpoint layout, the rest of it as
        well, as it is in the base."""
        module, regions = self.modules[module_name], self.regions[module_name]
        if is_in_checkpoint_layout(module, regions):
            for region in regions:
                if torn or region.name in updates:
                    fill(region, getattr(module, region.parameter), asked(updates, region.name), read, generator)
            return
        matrix = next((region.name for region in regions if region.parameter == "weight"), regions[0].name)
        known = {matrix: asked(updates, matrix)}
        with rebuilt(module, by_columns=packs_faster_by_columns(module, regions, known[matrix])):
            for region in regions:
                factors = known.pop(region.name) if region.name in known else asked(updates, region.name)
                fill(region, getattr(module, region.parameter), factors, read, generator)

    def _repack_tied_head(self, written: Iterable[str]) -> None:
        """Rebuild the kernel of an output head that shares a tensor just written: on CPU it computes from a copy."""
        parameters = {id(p) for name in written for p in self.modules[name].parameters(recurse=False)}
        for name, module in self.modules.items():
            weight = getattr(module, "weight", None)
            shared = name not in written and id(weight) in parameters
            if (shared or name in written) and keeps_a_packed_copy(module):
                module.quant_method.process_weights_after_loading(module)

    # ---- reading

    @torch.no_grad()
    def kernel_replies(self, spans: Mapping[str, Sequence[Span]]) -> dict[str, KernelReply]:
        """This worker's share of x W^T through the live kernels: see `audit.Kernels`."""
        holders = {weight.rpartition(".")[0]: owners[0] for weight, owners in self.owners.items()}
        kernels = KernelOutputs(self)
        pieces: dict[str, list[Piece]] = {}
        experts: dict[str, dict[str, Sequence[Span]]] = {}  # engine module -> those asked of its stack, `....experts.3`
        for name, wanted in spans.items():
            stack, _, last = name.rpartition(".")
            if last.isdecimal() and stack in holders:
                experts.setdefault(holders[stack], {})[name] = wanted
            else:
                pieces[name] = self._kernel_pieces(name, tuple(map(tuple, wanted)), kernels)
        replies = joined(pieces)
        for module_name, asked in experts.items():
            replies |= self._expert_replies(module_name, asked)
        return replies

    def _expert_replies(self, module_name: str, spans: Mapping[str, Sequence[Span]]) -> dict[str, KernelReply]:
        """This worker's share of what the kernel of stacked experts makes of the vectors, expert by expert."""
        module = self.modules[module_name]
        method, parallel = module.quant_method, module.moe_config.moe_parallel_config
        if method.is_monolithic or parallel.use_all2all_kernels:  # routes by itself, or through other workers
            return {}
        experts = [int(name.rpartition(".")[2]) for name in spans]
        vectors = audit.probe_vectors(module.hidden_size, self.device).to(self.dtype)
        tokens, routes = audit.tokens_of_experts(vectors, experts)
        weights = torch.ones(routes.shape, device=self.device)
        with self.context():
            output = method.apply(module, tokens, weights, routes.int(), None, None)
        replies = {}
        for position, (expert, (name, wanted)) in enumerate(zip(experts, spans.items(), strict=True)):
            here = module.expert_map is None or int(module.expert_map[expert]) >= 0
            features = row_index(tuple(map(tuple, wanted)), self.device)
            reply = output[position * len(vectors) : (position + 1) * len(vectors), features].float()
            covered = torch.full(reply.shape, here / parallel.tp_size)
            replies[name] = KernelReply(reply.cpu(), covered, coarse_eps(module))
        return replies

    def _kernel_pieces(self, name: str, spans: tuple[Span, ...], kernels: KernelOutputs) -> list[Piece]:
        """The parts of the reply of one weight; none where no kernel of this worker multiplies by it.

        Nor of one that lies transposed in the checkpoint (GPT-2's), whose rows are no output features: of those the
        probe is the proof.
        """
        pieces = []
        for module_name in self.owners.get(name, ()):
            for region in (r for r in self.regions[module_name] if r.name == name and r.parameter == "weight"):
                reply = None if region.transposed else kernels.of(module_name, region)
                if reply is None:
                    break
                first = region.offset // region.stride[0]  # output features lie in the order of the rows
                here, picked = features_in(spans, region.rows, first, reply.device)
                covered = audit.covered_by(region.columns, region.total_columns)
                eps = coarse_eps(self.modules[module_name])
                pieces.append(Piece(reply[:, picked], here, covered, eps))
        return pieces

    def kernel(self, module_name: str) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """x -> x W^T as the live module computes it; None where it is no matrix.

        An embedding looks its live parameter up.  Where an output head shares it, the head answers: its kernel was
        packed from that parameter.
        """
        from vllm.model_executor.layers.linear import LinearBase
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

        module = self.modules[module_name]
        if isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead):
            weight = module.weight
            heads = [m for m in self.modules.values() if isinstance(m, ParallelLMHead) and m.weight is weight]
            if not heads:
                return lambda x: x @ weight.mT
            module = heads[0]
        if not isinstance(module, LinearBase | ParallelLMHead):
            return None
        return lambda x: module.quant_method.apply(module, x, None)


@functools.lru_cache(maxsize=1024)
def features_in(
    spans: tuple[Span, ...], rows: Span, first: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which of the output features `spans` are among `rows` (a mask), and where those lie in a kernel's output, in
    which `rows` begin at `first`."""
    features = row_index(spans, torch.device("cpu"))
    here = (features >= rows[0]) & (features < rows[1])
    return here, (features[here] - rows[0] + first).to(device)


@dataclass(frozen=True)
class Piece:
    """Of one weight's reply, what one region gives.

    `output` (VECTORS, features) is on the engine's device, `here` marks the features it is of among those asked for,
    and `covered` (VECTORS,) is the part of each vector's inputs that it is made from.
    """

    output: torch.Tensor
    here: torch.Tensor
    covered: torch.Tensor
    eps: float  # as of a KernelReply

    @property
    def is_whole(self) -> bool:
        """Whether it has every feature asked for."""
        return self.output.shape[1] == len(self.here)


def joined(pieces: Mapping[str, list[Piece]]) -> dict[str, KernelReply]:
    """The reply of every weight that has pieces, on the CPU."""
    there = {(name, i): piece.output for name, parts in pieces.items() for i, piece in enumerate(parts)}
    outputs = {place: output.float() for place, output in audit.on_host(there).items()}
    replies = {}
    for name, parts in pieces.items():
        if not parts:
            continue
        if len(parts) == 1 and parts[0].is_whole:
            covered = parts[0].covered[:, None].expand_as(outputs[name, 0])
            replies[name] = KernelReply(outputs[name, 0], covered, parts[0].eps)
            continue
        output, covered = torch.zeros(2, audit.VECTORS, len(parts[0].here))
        for i, piece in enumerate(parts):
            output[:, piece.here] += outputs[name, i]
            covered[:, piece.here] += piece.covered[:, None]
        replies[name] = KernelReply(output, covered, max(piece.eps for piece in parts))
    return replies


class KernelOutputs:
    """What each live kernel makes of the audit's vectors, computed once for all the weights fused in it."""

    def __init__(self, live: LiveModel) -> None:
        self.live = live
        self._vectors: dict[int, torch.Tensor] = {}
        self._last: tuple[tuple[str, Span], torch.Tensor | None] | None = None  # one: a whole model's would add up

    def of(self, module_name: str, region: Region) -> torch.Tensor | None:
        """x W^T (VECTORS, features) of the module that holds `region`; None where it is no matrix."""
        key = module_name, region.columns
        if self._last is None or self._last[0] != key:
            kernel = self.live.kernel(module_name)
            vectors = self._vectors_of(region.total_columns)[:, slice(*region.columns)]
            self._last = key, None if kernel is None else kernel(vectors.contiguous())
        return self._last[1]

    def _vectors_of(self, features: int) -> torch.Tensor:
        if features not in self._vectors:
            self._vectors[features] = audit.probe_vectors(features, self.live.device).to(self.live.dtype)
        return self._vectors[features]


def fill(
    region: Region,
    parameter: torch.Tensor,
    factors: Factors | None,
    read: Callable[[str], Read],
    generator: Callable[[str], torch.Generator | None],
) -> None:
    """Write one region: folded where there are factors, pristine where there are none.

    Raises:
        OverflowError: where the weight has outgrown float16.
    """
    out = region.view(parameter)
    if region.ops:
        source = read(region.name)(region.rows, region.columns) if factors is None else factors.tensors["weight"]
        out.copy_(replay(region.ops, source))
    elif factors is None:
        out.copy_(read(region.name)(region.rows, region.columns))
    elif factors.rule == "dense" and out.ndim != 2:
        out.copy_(factors.tensors["weight"][slice(*region.rows)])
    else:
        fold_slice(read(region.name), factors, region.rows, region.columns, out, generator(region.name))
    if out.dtype == torch.float16 and not out.isfinite().all():
        raise OverflowError(
            f"{region.name}: the weight to serve exceeds {torch.finfo(torch.float16).max:.0f}, the largest number of "
            "float16; serve in bfloat16 or float32 (vllm_dtype)"
        )


# ---- the dry run


def dry_run(live: LiveModel, tensors: Mapping[str, tuple[int, ...]]) -> list[Any]:
    """vLLM's record of every copy that loading `tensors` would make; the model is left as it was."""
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
        finally:
            Recorder._restore_after_dry_run(None, live.model)
    return [scatter for scatters in sink.copies_by_layer.values() for scatter in scatters]


def make_region(name: str, shape: tuple[int, ...], ops: tuple, scatter: Any) -> Region:
    """The rectangle of a checkpoint tensor that a chain of slicing ops cuts out.

    The ops are replayed on index tensors: one holds each element's row, one its column, both expanded, so that they
    take no memory.
    """
    rows = torch.arange(shape[0])
    columns = torch.zeros(1, dtype=torch.long)
    if len(shape) == 2:
        rows, columns = rows[:, None].expand(shape), torch.arange(shape[1])[None].expand(shape)
    elif len(shape) == 1:
        columns = columns.expand(shape)
    else:
        place = scatter.param_name, scatter.offset, scatter.shape, scatter.stride
        return Region(name, (0, shape[0]), (0, 1), 1, False, *place, ops)
    rows, columns = replay(ops, rows), replay(ops, columns)
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
    )
    if (region.rows[1] - region.rows[0]) * (region.columns[1] - region.columns[0]) != rows.numel():
        raise NotImplementedError(f"{name}: vLLM loads a part of it that is not a rectangle")
    return region


def replay(ops: tuple, tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` after the slicing that vLLM's loader did to the checkpoint tensor in its place."""
    for op, arguments, keywords in ops:
        if op != "contiguous":  # it would fill an expanded index with memory
            tensor = getattr(tensor, op)(*arguments, **dict(keywords))
    return tensor


def _span(index: torch.Tensor) -> Span:
    return int(index[(0,) * index.ndim]), int(index[(-1,) * index.ndim]) + 1


# ---- modules


def is_in_checkpoint_layout(module: nn.Module, regions: list[Region]) -> bool:
    """Whether the live parameters are what the checkpoint holds, so that they can be written in place.

    CUDA graphs stay valid then: the storage is the same.  False for weights that were packed, padded or quantized.
    """
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    if not isinstance(getattr(module, "quant_method", None), UnquantizedLinearMethod | None) and not hasattr(
        module, "num_embeddings"
    ):
        return False
    loaded, _ = get_layerwise_info(module).restore_metadata
    for parameter in {region.parameter for region in regions}:
        live, start = getattr(module, parameter), loaded.get(parameter)
        if start is not None and (live.shape, live.stride()) != (start.shape, start.stride()):
            return False
    return True


def coarse_eps(module: nn.Module) -> float:
    """The eps of weights that the module keeps in 8-bit floats, whose rounding stands in every product; 0 of others."""
    dtypes = {parameter.dtype for parameter in module.parameters(recurse=False)}
    return max((torch.finfo(d).eps for d in dtypes if d.is_floating_point and d.itemsize == 1), default=0.0)


def keeps_a_packed_copy(module: nn.Module) -> bool:
    """Whether a CPU kernel of this module computes from a copy of a weight that is kept as well (an output head)."""
    weight = getattr(module, "weight", None)
    return hasattr(module, "cpu_linear") and weight is not None and weight.numel() > 0


def asked(updates: Mapping[str, Factors], name: str) -> Factors | None:
    """None where there are none; `get` would take a KeyError from the making of lazy factors for that."""
    if name not in updates:
        return None
    return updates[name]


def packs_faster_by_columns(module: nn.Module, regions: list[Region], factors: Factors | None) -> bool:
    """Whether the module's weight should be written column by column: in memory its transpose.

    oneDNN packs a float32 weight from that in half the time (measured, AVX-512), and the product of column blocks comes
    out that way by itself.  Every other rule would have to transpose what it writes, which takes longer than is won.
    """
    from vllm.platforms import current_platform

    if factors is None or factors.rule != "block_columns" or not hasattr(module, "cpu_linear"):
        return False
    matrices = [region for region in regions if region.parameter == "weight"]
    whole_rows = all(
        not region.transposed and region.stride == (region.total_columns, 1) and region.columns[0] == 0
        for region in matrices
    )
    # AMD's own library packs where it is installed
    return whole_rows and module.weight.dtype == torch.float32 and not current_platform.is_zen_cpu()


def lies_column_by_column(parameter: torch.Tensor) -> bool:
    return parameter.ndim == 2 and not parameter.is_contiguous() and parameter.mT.is_contiguous()


@contextmanager
def rebuilt(module: nn.Module, by_columns: bool = False) -> Any:
    """The module in checkpoint layout, uninitialised, to be filled; packed again into its kernel's tensors afterwards.

    With `by_columns` its weight lies in memory as its transpose.  Where filling it fails, the module is put together as
    it was, its kernel's tensors in their storage, which CUDA graphs read.  Where packing it fails, a CPU's packed
    weight is gone: to keep it until the new one is made would take its memory twice.  The module then computes nothing
    until it is rebuilt, which the next `LiveModel.write` does.
    vLLM's own steps for one layer of a reload.  One layer's worth of memory; on CPU glibc finds no place for an aligned
    block in the hole that one of its size left, so the heap grows by several (0.5 GB at 0.6B parameters).  To return
    each hole at once by `malloc_trim` keeps it to 70 MB and doubles the time of the fold, in page faults.
    """
    from vllm.model_executor.model_loader.reload import layerwise, meta
    from vllm.model_executor.model_loader.reload.utils import get_layer_params_buffers, get_layer_tensors

    info = layerwise.get_layerwise_info(module)
    info.kernel_tensors = get_layer_params_buffers(module)
    info.kernel_non_persistent_buffers = set(module._non_persistent_buffers_set)
    processed = {name: vars(module)[name] for name in (PROCESSED,) if name in vars(module)}
    in_place: list[tuple[torch.Tensor, torch.Tensor]] = []
    try:
        meta.restore_layer_on_meta(module, info)
        # vLLM leaves a bias where it is, to be filled live
        in_place = [(t, t.data.clone()) for t in get_layer_tensors(module).values() if not t.is_meta]
        meta.materialize_layer(module, info)
        if by_columns:
            module.weight.data = module.weight.data.view(module.weight.shape[::-1]).mT
        vars(module).pop(PROCESSED, None)
        yield
        if hasattr(module, "cpu_linear"):  # the packed weight before goes first, so that the new one takes its place
            del module.cpu_linear
        module.quant_method.process_weights_after_loading(module)
        pack_cpu_experts(module)
        if hasattr(module, "update_param_tp_status"):
            module.update_param_tp_status()
        layerwise._copy_and_restore_kernel_tensors(module, info)
    except BaseException:
        layerwise._place_kernel_tensors(module, info)
        vars(module).update(processed)
        for tensor, before in in_place:
            tensor.data.copy_(before)
        raise
    finally:
        info.reset()


def pack_cpu_experts(module: nn.Module) -> None:
    """Prepack experts on a CPU, which vLLM 0.31 does at the first load only: a reload of the same weights moves
    log-probs by nats (`UnquantizedFusedMoEMethod._setup_kernel`)."""
    from vllm.platforms import current_platform

    experts = getattr(getattr(module.quant_method, "moe_kernel", None), "fused_experts", None)
    if experts is not None and current_platform.is_cpu():
        experts.process_weights_after_loading(module)


def check_layout() -> None:
    """Raises RuntimeError where this vLLM lacks a private name that this file relies on."""
    import vllm

    missing = defaultdict(list)
    for module_name, names in PRIVATE_NAMES.items():
        try:
            module = importlib.import_module(module_name)
        except ImportError:
            missing[module_name] = list(names)
            continue
        missing[module_name] = [name for name in names if not hasattr(module, name)]
    faults = [f"{module}.{name}" for module, names in missing.items() for name in names]
    if faults:
        raise RuntimeError(
            f"vLLM {vllm.__version__} lacks {', '.join(faults)}. fura_rl reads vLLM {VLLM_VERSIONS_READ}: install that "
            "version, or bring fura_rl/sync/vllm_model.py up to the new layout"
        )
