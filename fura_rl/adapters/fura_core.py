"""The tensors of one FuRA adapter on one layer, and what they make of the block algebra."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import nn

from fura_rl.adapters import blocks
from fura_rl.adapters.frames import Frame
from fura_rl.adapters.fura_config import FuraConfig

RANDOM_UPDATE_STD = 0.1  # init_weights=False: relative size of the random update, large enough for tests to see


class FuraCore(nn.Module):
    """Trained `delta_s`, `delta_r`, `large_core` (those that the config trains); frozen `basis_v`, `basis_s`.

    A module of its own (not entries of a ParameterDict) so that parameter names carry the adapter name in the middle,
    where PEFT and TRL look for it.  The basis stays in float32 or wider whatever the model is cast to: rounding it to
    16 bits would move the adapted weight by more than a training step does.
    """

    def __init__(self, frame: Frame, config: FuraConfig, axis: str) -> None:
        super().__init__()
        n, b, r = frame.right.shape
        options = {"dtype": frame.right.dtype, "device": frame.right.device}
        self.axis, self.block_size = axis, b
        self.form, self.treatment, self.train_core = config.form, config.singular_values, config.train_core
        self.basis = config.basis
        self.save_basis = config.save_basis
        self.delta_s = nn.Parameter(torch.zeros(n, r, **options)) if self.treatment == "train" else None
        self.delta_r = nn.Parameter(torch.zeros(n, r, b, **options)) if self.train_core != "large" else None
        self.large_core: nn.Parameter | None = None  # set by the layer where it is trained
        self.register_buffer("basis_v", frame.right.contiguous(), persistent=config.save_basis)
        values = frame.singular_values
        self.register_buffer("basis_s", None if values is None else values.contiguous())
        self._inverse: tuple[torch.Tensor | None, int, torch.Tensor | None] = None, 0, None

    def scale(self) -> torch.Tensor | None:
        """T (n, r), None where the frame has no singular values."""
        return None if self.basis_s is None else blocks.core_scale(self.basis_s, self.treatment, self.train_core)

    def _wide(self, delta: torch.Tensor | None) -> torch.Tensor | None:
        """In float32 or wider, whatever the adapter is stored in or the forward runs in."""
        return None if delta is None else delta.to(torch.promote_types(self.basis_v.dtype, torch.float32))

    def inverse_values(self) -> torch.Tensor:
        """`pseudo_inverse` of S0, (n, r); anew only where S0 is another tensor by now, or was written to."""
        values = self.basis_s
        if torch.compiler.is_compiling() or values.is_inference():  # the latter counts no writes
            return blocks.pseudo_inverse(values)
        source, version, inverse = self._inverse
        if source is not values or version != values._version:
            with torch.inference_mode(False):  # an evaluation may come first, and training saves this for its backward
                inverse = blocks.pseudo_inverse(values)
            self._inverse = values, values._version, inverse
        return inverse

    def spectral_tensors(self) -> tuple[torch.Tensor, ...] | None:
        """dR, dS, V0 and 1 / S0 where D is `blocks.spectral_update` of them, the paper's setting; else None."""
        delta_r, delta_s, right = self.delta_r, self.delta_s, self.basis_v
        if delta_r is None or delta_s is None:
            return None
        if not delta_r.dtype == delta_s.dtype == right.dtype or right.dtype.itemsize < 4:
            delta_r, delta_s = self._wide(delta_r), self._wide(delta_s)
        return delta_r, delta_s, right, self.inverse_values()

    def change(self) -> torch.Tensor:
        """C - C0, (n, r, b), in float32 or wider."""
        deltas = self._wide(self.delta_r), self._wide(self.delta_s)
        return blocks.core_change(self.basis_v, self.basis_s, *deltas, self.treatment)

    def update(self) -> torch.Tensor:
        """D, (n, b, b): the base form's block update."""
        return self.update_from(self.delta_r, self.delta_s)

    def update_from(self, delta_r: torch.Tensor | None, delta_s: torch.Tensor | None) -> torch.Tensor:
        """D for these values of what is trained: those of a sharded policy are gathered first."""
        delta_r, delta_s = self._wide(delta_r), self._wide(delta_s)
        with blocks.without_autocast(self.basis_v.device.type):
            if delta_r is not None and delta_s is not None:
                return blocks.spectral_update(delta_r, delta_s, self.basis_v, self.inverse_values())
            change = blocks.core_change(self.basis_v, self.basis_s, delta_r, delta_s, self.treatment)
            return blocks.block_update(change, self.basis_v, self.scale())

    @property
    def update_kind(self) -> Hashable | None:
        """Equal for cores whose D `updates_together` makes at once; None where it is made alone."""
        if self.delta_r is None or self.delta_s is None:
            return None
        _, b, r = self.basis_v.shape
        return b, r, self.delta_r.dtype, self.delta_s.dtype, self.basis_v.dtype, self.basis_v.device

    def core(self, adapted: bool = True) -> torch.Tensor:
        """C, (n, r, b): the core form's small core, trained or (not `adapted`) as it started."""
        with blocks.without_autocast(self.basis_v.device.type):
            start = blocks.starting_core(self.basis_v, self.scale())
            return start + self.change() if adapted else start

    @torch.no_grad()
    def fit(self, update: torch.Tensor) -> None:
        """Set the small core so that the block update is `update` (n, b, b), as far as the frame reaches; dS is 0."""
        scale = self.scale()
        if scale is None and self.form == "base":
            start = torch.linalg.pinv(self.basis_v.double()).to(self.basis_v.dtype)
        else:
            start = blocks.starting_core(self.basis_v, scale)
        change = start @ update.to(start)
        if self.treatment in ("train", "freeze"):
            change = blocks.pseudo_inverse(self.basis_s).unsqueeze(-1) * change
        self.delta_r.copy_(change)
        if self.delta_s is not None:
            self.delta_s.zero_()

    @torch.no_grad()
    def randomize(self) -> None:
        n, b, _ = self.basis_v.shape
        std = RANDOM_UPDATE_STD / b**0.5
        if self.delta_r is not None:
            self.fit(torch.randn(n, b, b, device=self.basis_v.device).mul_(std))
        if self.delta_s is not None:
            self.delta_s.normal_(std=std).mul_(self.basis_s)
        if self.large_core is not None:
            noise = torch.randn_like(self.large_core) * self.large_core.square().mean().sqrt()
            self.large_core.add_(RANDOM_UPDATE_STD * noise)

    def _apply(self, fn: Any, recurse: bool = True) -> FuraCore:
        before = {name: buffer for name, buffer in self.named_buffers()}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = getattr(self, name)
            if new.dtype != old.dtype and new.device.type != "meta":
                setattr(self, name, old.to(new.device))
        return self

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        error_messages = args[-1]
        saved = state_dict.get(prefix + "basis_s")
        if not self.save_basis and saved is not None and self.basis_s.device.type != "meta":
            same_shape = saved.shape == self.basis_s.shape
            rounding = max(1e-3, torch.finfo(saved.dtype).eps)
            if not same_shape or not torch.allclose(saved.to(self.basis_s), self.basis_s, rtol=rounding, atol=1e-6):
                error_messages.append(
                    f"{prefix.rstrip('.')}: the adapter was saved with save_basis=False and its singular values do not "
                    "match this base weight; load it on the base model it was trained on, or save with save_basis=True"
                )
        if not self.save_basis and self.basis_v.device.type == "meta" and saved is not None:
            error_messages.append(
                f"{prefix.rstrip('.')}: save_basis=False computes the basis from the base weight, which had no values "
                "(meta device) when the adapter was made; make it on a model with weights, or save with save_basis=True"
            )
        for key in (prefix + "basis_v", prefix + "basis_s"):  # `assign=True` would put it in as narrow as it was saved
            if key in state_dict:
                state_dict[key] = state_dict[key].to(torch.promote_types(state_dict[key].dtype, torch.float32))
        super()._load_from_state_dict(state_dict, prefix, *args)


@torch.no_grad()
def updates_together(cores: Sequence[FuraCore]) -> Sequence[torch.Tensor]:
    """D (n, b, b) of each of `cores`, which are of one `update_kind`: one by one it is mostly launches."""
    deltas_r, deltas_s, rights, inverses = zip(*(core.spectral_tensors() for core in cores), strict=True)
    together = (torch.cat(parts) for parts in (deltas_r, deltas_s, rights, inverses))
    with blocks.without_autocast(rights[0].device.type):
        update, _ = blocks.spectral_update_forward(*together)
    return update.split([len(right) for right in rights])
