"""A live vLLM model as something to fold weights into, always from the pristine base.

`vllm_plan.py` finds where each checkpoint tensor lands, `vllm_modules.py` packs a module again where its kernel wants
it, `vllm_replies.py` asks the kernels what they compute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fura_rl.finite import all_finite
from fura_rl.sync.factors import Factors, Read, fold_slice, matrix_shape
from fura_rl.sync.stacks import Stacks, parts_of
from fura_rl.sync.vllm_modules import is_in_checkpoint_layout, keeps_a_packed_copy, packs_faster_by_columns, rebuilt
from fura_rl.sync.vllm_plan import Region, dry_run, make_region, replay
from fura_rl.sync.vllm_private import check_layout


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
        from vllm.model_executor.layers.attention import is_deferred_attention_layer

        self.modules = dict(self.model.named_modules())
        attention = [module for module in self.modules.values() if is_deferred_attention_layer(module)]
        self._deriving = [(layer, {id(part) for part in layer.modules()} - {id(layer)}) for layer in attention]
        self.model.register_forward_pre_hook(self._refuse_while_poisoned)

    def _refuse_while_poisoned(self, *_: Any) -> None:
        if self.poisoned:
            raise PoisonedEngineError(f"this engine refuses to generate: {self.poisoned}; sync it again")

    # ---- the plan

    def record(self, tensors: Mapping[str, tuple[int, ...]], stacks: Stacks) -> None:
        """Find where each checkpoint tensor (name -> shape) lands, by a dry run of the model's own loaders, which take
        those of `stacks` expert by expert.

        Raises:
            NotImplementedError: where a loader does more than slice a tensor.
        """
        self.regions, self.owners = {}, {}
        modules_by_id = {id(module): name for name, module in self.modules.items()}
        shapes: dict[str, tuple[int, ...]] = {}
        places: dict[str, tuple[str, int]] = {}  # what a loader takes -> the tensor it is of, and its first row there
        for name, shape in tensors.items():
            parts = parts_of(name, shape, stacks.get(name, ()))
            places |= {part: (name, i * rows) for i, (part, (rows, *_)) in enumerate(parts.items())}
            shapes |= parts
        for scatter in dry_run(self, shapes):
            part, ops = scatter.src
            name, first_row = places[part]
            module = modules_by_id[id(scatter.layer)]
            region = make_region(part, shapes[part], ops, scatter).within(name, first_row)
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
            self._derive_again(by_module)
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
            written = [region for region in regions if torn or region.name in updates]
            for region, factors in with_factors(written, updates, {}):
                fill(region, getattr(module, region.parameter), factors, read, generator)
            return
        matrix = next((region.name for region in regions if region.parameter == "weight"), regions[0].name)
        made = {matrix: asked(updates, matrix)}
        with rebuilt(module, by_columns=packs_faster_by_columns(module, regions, made[matrix])):
            for region, factors in with_factors(regions, updates, made):
                fill(region, getattr(module, region.parameter), factors, read, generator)

    def _repack_tied_head(self, written: Iterable[str]) -> None:
        """Rebuild the kernel of an output head that shares a tensor just written: on CPU it computes from a copy."""
        heads = {name: module for name, module in self.modules.items() if keeps_a_packed_copy(module)}
        for name, module in heads.items():
            if name in written or any(module.weight is p for w in written for p in self.modules[w].parameters(False)):
                module.quant_method.process_weights_after_loading(module)

    def _derive_again(self, written: Iterable[str]) -> None:
        """Have attention layers make anew what they compute with instead of a module just written: MLA absorbs parts of
        `kv_b_proj` in its queries and outputs.  Into the same storage, which CUDA graphs read."""
        touched = {id(self.modules[name]) for name in written}
        for layer, parts in self._deriving:
            if not touched.isdisjoint(parts):
                layer.process_weights_after_loading(self.dtype)


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
    place = out = region.view(parameter)
    if region.row_order is not None:
        out = out.new_empty(region.rows[1] - region.rows[0], *out.shape[1:])
    elif region.ops:
        out = out.new_empty(matrix_shape(region.tensor_shape))
    if factors is None:
        out.copy_(read(region.name)(region.rows, region.columns).reshape_as(out))
    elif factors.rule == "dense" and out.ndim != 2:  # a vector, or what a loader makes one of
        out.copy_(factors.tensors["weight"][slice(*region.rows)].reshape_as(out))
    else:
        fold_slice(read(region.name), factors, region.rows, region.columns, out, generator(region.name))
    if region.row_order is not None:
        place.copy_(out[list(region.row_order)])
    elif region.ops:
        place.copy_(replay(region.ops, out.view(region.tensor_shape)))
    if out.dtype == torch.float16 and not all_finite([out]):
        raise OverflowError(
            f"{region.name}: the weight to serve exceeds {torch.finfo(torch.float16).max:.0f}, the largest number of "
            "float16; serve in bfloat16 or float32 (vllm_dtype)"
        )


def with_factors(
    regions: Iterable[Region], updates: Mapping[str, Factors], made: dict[str, Factors | None]
) -> Iterator[tuple[Region, Factors | None]]:
    """Each region with the factors of its weight, of which some may be `made` already.

    They are asked for once for the regions of a weight that follow each other, as those of a stack's experts do: a
    whole stack made anew for each of them would take the square of their number.
    """
    last: tuple[str, Factors | None] = "", None
    for region in regions:
        if region.name in made:
            last = region.name, made.pop(region.name)
        elif region.name != last[0]:
            last = region.name, asked(updates, region.name)
        yield region, last[1]


def asked(updates: Mapping[str, Factors], name: str) -> Factors | None:
    """None where there are none; `get` would take a KeyError from the making of lazy factors for that."""
    if name not in updates:
        return None
    return updates[name]
