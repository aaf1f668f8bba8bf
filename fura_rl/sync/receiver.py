"""The engine's side of a weight sync: stage, validate, commit.  One in every worker.

Staging keeps what arrives aside while the engine goes on generating; nothing live is touched before a version is
complete, checked and of the right owner.  A commit always folds from the pristine base, so that the same message
brings an engine from any state to its version.  A commit that fails half-way is undone by folding the version before;
where that fails too, or is not enough, the engine refuses to generate.  Knows nothing of vLLM: it is handed a model to
write into.
"""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fura_rl.sync import payload
from fura_rl.sync.base_weights import BaseWeights
from fura_rl.sync.engine import LazyFactors, rounding_generator
from fura_rl.sync.factors import Factors
from fura_rl.sync.fingerprint import Sample
from fura_rl.sync.stacks import Stacks, parts_of

if TYPE_CHECKING:
    from fura_rl.sync.vllm_model import LiveModel


logger = logging.getLogger(__name__)


class OwnershipError(RuntimeError):
    """Another trainer holds this engine."""


@dataclass
class Staged:
    """What has arrived of one version."""

    version: int
    chunks: dict[int, dict[str, Factors]] = field(default_factory=dict)

    @property
    def factors(self) -> dict[str, Factors]:
        return {name: factors for chunk in self.chunks.values() for name, factors in chunk.items()}


class Receiver:
    """Weights of one worker.

    Args:
        model: the live model to write into.
        base: the pristine base weights it is folded from.
    """

    def __init__(self, model: LiveModel, base: BaseWeights) -> None:
        self.model = model
        self.base = base
        self.version = 0
        self.owner: str | None = None
        self._last_owner: str | None = None
        self.phases: dict[str, float] = {}
        self._lease_ends = 0.0
        self._lease_seconds = 0.0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._staged: Staged | None = None
        self._applied: Mapping[str, Factors] | None = None  # of `version`, to go back to
        self._applied_seed: int | None = None
        self._changed: set[str] = set()  # weights that the owner has written
        self._left_over: set[str] = set()  # weights that owners before have written

    # ---- ownership

    def claim(
        self,
        owner: str,
        lease_seconds: float,
        tensors: dict[str, tuple[int, ...]],
        stacks: Stacks,
        base_samples: Mapping[str, Sample],
    ) -> None:
        """Take this engine for one trainer, and learn where the tensors of its policy go.

        Raises:
            OwnershipError: while another trainer's lease runs.
            ValueError: where the engine's base weights are not the trainer's.
        """
        self._check_owner(owner, free_is_fine=True)
        self.base.parts = {name: list(parts_of(name, tensors[name], patterns)) for name, patterns in stacks.items()}
        if different := self.base.differences(base_samples):
            shown = ", ".join(different[:4])
            raise ValueError(
                f"the engine serves another base model ({self.base.folder}) than the trainer adapts: {len(different)} "
                f"of {len(base_samples)} base weights differ, {shown} first; start both from the same checkpoint"
            )
        self.model.record(tensors, stacks)
        self._shapes = tensors
        if owner != self._last_owner:
            self._left_over |= self._changed
            self._changed, self._last_owner = set(), owner
        self.owner, self._lease_seconds = owner, lease_seconds
        self._staged = None
        self.renew(owner)

    def renew(self, owner: str) -> None:
        self._check_owner(owner)
        self._lease_ends = time.monotonic() + self._lease_seconds

    def release(self, owner: str) -> None:
        """Give the engine back; its weights stay."""
        self._check_owner(owner)
        self.owner, self._staged = None, None

    def _check_owner(self, owner: str, free_is_fine: bool = False) -> None:
        left = self._lease_ends - time.monotonic()
        if self.owner == owner or (free_is_fine and (self.owner is None or left <= 0)):
            return
        if self.owner is None:
            raise OwnershipError("no trainer has claimed this engine since it started; claim it and sync again")
        raise OwnershipError(
            f"this engine belongs to trainer {self.owner}, whose lease runs for another {max(left, 0):.0f} s; stop "
            "that trainer, wait for its lease to end, or use another engine"
        )

    # ---- stage, validate, commit

    def stage(self, owner: str, version: int, previous: int | None, index: int, data: bytes, checksum: int) -> None:
        """Keep one chunk of a version aside; nothing live is touched.  It may follow any version if `previous` is None.

        Chunks are made while they are sent, so that only the commit says how many there are; the first one starts the
        version anew.

        Raises:
            OwnershipError: for another owner.
            PayloadError: for a damaged chunk, or a version that does not follow the one that is served.
        """
        self.renew(owner)
        started = time.monotonic()
        if previous not in (None, self.version):
            raise payload.PayloadError(
                f"version {version} was made to follow version {previous}, but this engine serves {self.version}"
            )
        if index == 0 or self._staged is None or self._staged.version != version:
            self._staged, self.phases = Staged(version), {"stage": 0.0}
        self._staged.chunks[index] = payload.decode(data, checksum)
        self.phases["stage"] += time.monotonic() - started

    def commit(self, owner: str, version: int, chunk_count: int, rounding_seed: int | None = None) -> None:
        """Check the staged version, of `chunk_count` chunks, then fold it into the live weights.

        Raises:
            OwnershipError: for another owner.
            PayloadError: where it is incomplete, misshapen or not finite, or leaves weights of another trainer that
                cannot be put back; the weights are those of before.
            KeyError: for a tensor that no parameter of the engine takes; the weights are those of before.
        """
        self.renew(owner)
        started = time.monotonic()
        factors = self._validate(version, chunk_count)
        checked = time.monotonic()
        put_back = self._left_over_beside(factors)
        self.model.check_places(factors)
        sound, before = self.model.poisoned is None, self._changed
        self._changed = before | factors.keys()
        try:
            self._write(factors, put_back, rounding_seed)
        except Exception as failure:
            try:
                if sound:  # what was torn before this commit is nothing to go back to
                    self._roll_back(factors.keys() | put_back, before)
            except Exception as error:
                logger.warning("after %r the weights of before could not be put back: %r", failure, error)
            raise
        self.renew(owner)  # a long fold outlasts the lease, and another trainer's claim may wait behind it
        self.version, self._staged, self._left_over = version, None, set()
        small = all(f.rule != "dense" for f in factors.values())
        self._applied, self._applied_seed = factors if small else None, rounding_seed
        self.phases |= {"validate": checked - started, "fold": time.monotonic() - checked}

    def _validate(self, version: int, chunk_count: int) -> dict[str, Factors]:
        staged = self._staged
        if staged is None or staged.version != version:
            raise payload.PayloadError(f"version {version} was never staged here; send it before it is committed")
        if missing := set(range(chunk_count)) - set(staged.chunks):
            raise payload.PayloadError(
                f"version {version} is incomplete: {len(missing)} of {chunk_count} chunks did not arrive"
            )
        payload.check(staged.factors, self._shapes)
        return staged.factors

    def _left_over_beside(self, factors: Mapping[str, Factors]) -> set[str]:
        """The weights that owners before have changed and `factors` does not: to be put back to the base.

        Raises:
            PayloadError: where the checkpoint holds one of those in a form that is not known (`held_otherwise`), or the
                policy of this owner has it under another name, so that its place is not.
        """
        left_over = self._left_over - factors.keys()
        if lost := sorted(name for name in left_over if name not in self.base or name not in self.model.owners):
            raise payload.PayloadError(
                f"{', '.join(lost[:4])}: {len(lost)} weights are still those of another trainer, and the engine cannot "
                "put them back, since its checkpoint or the policy holds them otherwise; start the engine again"
            )
        return left_over

    def _write(self, factors: Mapping[str, Factors], put_back: Iterable[str], seed: int | None) -> None:
        """Fold `factors` into the live weights, and make those named by `put_back` the base's again."""
        makers = {name: functools.partial(self._pristine, name) for name in sorted(put_back)}
        makers |= {name: functools.partial(factors.__getitem__, name) for name in factors}

        @functools.lru_cache(maxsize=1)  # of a stack, which is asked for once an expert
        def on_device(name: str) -> Factors:
            return makers[name]().to_device(self.model.device)

        # one after another: all the whole weights at once would need the device's memory a second time
        moved = LazyFactors({name: functools.partial(on_device, name) for name in makers})
        seeds = dict.fromkeys(factors, seed)  # what is put back is rounded as when it was loaded, to nearest
        self.model.write(
            moved, self.base.read, lambda name: rounding_generator(seeds.get(name), name, self.model.device)
        )

    def _pristine(self, name: str) -> Factors:
        return Factors("dense", {"weight": self.base.whole(name)})

    def _roll_back(self, written: Set[str], changed: set[str]) -> None:
        """Undo the writing of `written`: fold the version before again, and put back to the base what it left alone.

        `changed` is what the owner had written by then.

        Raises:
            RuntimeError: where what was written over is not known any more: the model stays poisoned and refuses to
                generate.
        """
        if self._applied is None:
            raise RuntimeError(f"version {self.version} was not kept")
        untouched = written - self._applied.keys()
        if unknown := sorted(n for n in untouched if n in changed | self._left_over or n not in self.base):
            raise RuntimeError(f"version {self.version} does not hold {', '.join(unknown[:4])}")
        self._write(self._applied, untouched, self._applied_seed)
        self._changed = changed

    def status(self) -> dict[str, Any]:
        """What a trainer must know before it trusts this worker."""
        return {
            "pid": os.getpid(),
            "version": self.version,
            "owner": self.owner,
            "lease_ended": self.owner is not None and self._lease_ends <= time.monotonic(),
            "staged": None if self._staged is None else self._staged.version,
            "poisoned": self.model.poisoned,
            "phases": self.phases,
        }
