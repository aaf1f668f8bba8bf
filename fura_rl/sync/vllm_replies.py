"""What the kernels of a live vLLM model make of the audit's vectors: see `audit.Kernels`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fura_rl.sync import audit
from fura_rl.sync.audit import KernelReply
from fura_rl.sync.factors import Span, row_index
from fura_rl.sync.vllm_modules import coarse_eps
from fura_rl.sync.vllm_plan import Region

if TYPE_CHECKING:
    from fura_rl.sync.vllm_model import LiveModel

KernelKey = tuple[str, Span]  # a module of the engine and the columns of a weight that it multiplies by


@torch.no_grad()
def kernel_replies(live: LiveModel, spans: Mapping[str, Sequence[Span]]) -> dict[str, KernelReply]:
    """This worker's share of x W^T through the live kernels: see `audit.Kernels`."""
    holders = {weight.rpartition(".")[0]: owners[0] for weight, owners in live.owners.items()}
    kernels = KernelOutputs(live)
    pieces: dict[str, list[Piece]] = {}
    experts: dict[str, dict[str, Sequence[Span]]] = {}  # engine module -> those asked of its stack, `....experts.3`
    for name, wanted in spans.items():
        stack, _, last = name.rpartition(".")
        if last.isdecimal() and stack in holders:
            experts.setdefault(holders[stack], {})[name] = wanted
        else:
            pieces[name] = kernels.pieces(name, tuple(map(tuple, wanted)))
    replies = joined(pieces, kernels.outputs)
    for module_name, asked in experts.items():
        replies |= expert_replies(live, module_name, asked)
    return replies


def expert_replies(live: LiveModel, module_name: str, spans: Mapping[str, Sequence[Span]]) -> dict[str, KernelReply]:
    """This worker's share of what the kernel of stacked experts makes of the vectors, expert by expert."""
    module = live.modules[module_name]
    method, parallel = module.quant_method, module.moe_config.moe_parallel_config
    if method.is_monolithic or parallel.use_all2all_kernels:  # routes by itself, or through other workers
        return {}
    experts = [int(name.rpartition(".")[2]) for name in spans]
    vectors = audit.probe_vectors(module.hidden_size, live.device).to(live.dtype)
    tokens, routes = audit.tokens_of_experts(vectors, experts)
    weights = torch.ones(routes.shape, device=live.device)
    with live.context():
        output = method.apply(module, tokens, weights, routes.int(), None, None)
    replies = {}
    for position, (expert, (name, wanted)) in enumerate(zip(experts, spans.items(), strict=True)):
        here = module.expert_map is None or int(module.expert_map[expert]) >= 0
        features = row_index(tuple(map(tuple, wanted)), live.device)
        reply = output[position * len(vectors) : (position + 1) * len(vectors), features].float()
        covered = torch.full(reply.shape, here / parallel.tp_size)
        replies[name] = KernelReply(reply.cpu(), covered, coarse_eps(module))
    return replies


def kernel_of(live: LiveModel, module_name: str) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """x -> x W^T as the live module computes it; None where it is no matrix.

    An embedding looks its live parameter up.  Where an output head shares it, the head answers: its kernel was
    packed from that parameter.
    """
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    module = live.modules[module_name]
    if isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead):
        weight = module.weight
        heads = [m for m in live.modules.values() if isinstance(m, ParallelLMHead) and m.weight is weight]
        if not heads:
            return lambda x: x @ weight.mT
        module = heads[0]
    if not isinstance(module, LinearBase | ParallelLMHead):
        return None
    return lambda x: module.quant_method.apply(module, x, None)


@functools.lru_cache(maxsize=1024)
def features_in(
    spans: tuple[Span, ...], rows: Span, first: int, row_order: tuple[int, ...] | None
) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Which of the output features `spans` are among `rows` (a mask), where those lie in a kernel's output, in which
    `rows`, or those of `row_order`, begin at `first`, and whether that is every one of them."""
    features = row_index(spans, torch.device("cpu"))
    if row_order is None:
        here = (features >= rows[0]) & (features < rows[1])
        return here, features[here] - rows[0] + first, bool(here.all())
    places = {feature: place for place, feature in enumerate(row_order, start=first)}
    found = torch.tensor([places.get(feature, -1) for feature in features.tolist()])
    here = found >= 0
    return here, found[here], bool(here.all())


@dataclass(frozen=True)
class Piece:
    """Of one weight's reply, what one region gives.

    `here` marks its features among those asked for, of which they may be the whole, and `picked` are their places in
    the output of the `kernel`.  `covered` (VECTORS,) is the part of each vector's inputs that the output is made from.
    """

    kernel: KernelKey
    here: torch.Tensor
    picked: torch.Tensor
    is_whole: bool
    covered: torch.Tensor
    eps: float  # as of a KernelReply


def joined(pieces: Mapping[str, list[Piece]], outputs: Mapping[KernelKey, torch.Tensor]) -> dict[str, KernelReply]:
    """The reply of every weight that has pieces, on the CPU, from the kernels' outputs (VECTORS, features)."""
    outputs = audit.on_host(outputs)  # all of them at once: a look at each of a GPU's would wait for it
    replies = {}
    for name, parts in pieces.items():
        if not parts:
            continue
        if len(parts) == 1 and parts[0].is_whole:
            [part] = parts
            reply = outputs[part.kernel][:, part.picked].float()
            replies[name] = KernelReply(reply, part.covered[:, None].expand_as(reply), part.eps)
            continue
        output, covered = torch.zeros(2, audit.VECTORS, len(parts[0].here))
        for part in parts:
            output[:, part.here] += outputs[part.kernel][:, part.picked].float()
            covered[:, part.here] += part.covered[:, None]
        replies[name] = KernelReply(output, covered, max(part.eps for part in parts))
    return replies


class KernelOutputs:
    """What each live kernel makes of the audit's vectors, computed once for all the weights fused in it."""

    def __init__(self, live: LiveModel) -> None:
        self.live = live
        self.outputs: dict[KernelKey, torch.Tensor] = {}  # (VECTORS, features) each, on the engine's device
        self._vectors: dict[int, torch.Tensor] = {}
        self._eps: dict[str, float] = {}  # `coarse_eps` of every module that was asked

    def pieces(self, name: str, spans: tuple[Span, ...]) -> list[Piece]:
        """The parts of the reply of one weight; none where no kernel of this worker multiplies by it.

        Nor of one that lies transposed in the checkpoint (GPT-2's), whose rows are no output features: of those the
        probe is the proof.
        """
        pieces = []
        for module_name in self.live.owners.get(name, ()):
            for region in (r for r in self.live.regions[module_name] if r.name == name and r.parameter == "weight"):
                key = None if region.transposed else self._run(module_name, region)
                if key is None:
                    break
                first = region.offset // region.stride[0]  # output features lie in the order of the rows
                places = features_in(spans, region.rows, first, region.row_order)
                covered = audit.covered_by(region.columns, region.total_columns)
                pieces.append(Piece(key, *places, covered, self._eps[module_name]))
        return pieces

    def _run(self, module_name: str, region: Region) -> KernelKey | None:
        """Have the module that holds `region` compute x W^T, if that was not done; None where it is no matrix."""
        key = module_name, region.columns
        if key not in self.outputs:
            kernel = kernel_of(self.live, module_name)
            if kernel is None:
                return None
            self._eps[module_name] = coarse_eps(self.live.modules[module_name])
            self.outputs[key] = kernel(self._vectors_of(region.total_columns)[:, slice(*region.columns)].contiguous())
        return key

    def _vectors_of(self, features: int) -> torch.Tensor:
        if features not in self._vectors:
            self._vectors[features] = audit.probe_vectors(features, self.live.device).to(self.live.dtype)
        return self._vectors[features]
