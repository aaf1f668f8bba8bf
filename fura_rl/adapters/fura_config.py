"""`FuraConfig`: every setting of FuRA, in PEFT's style.  Settings that are not built yet are refused here, by name."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Literal

from peft import PeftConfig


class FuraPeftType(str, enum.Enum):  # noqa: UP042  PEFT reads `.value` and also uses the member as a dict key
    """FuRA's own entry beside `peft.PeftType`, whose members are fixed by PEFT."""

    FURA = "FURA"


CHOICES = {
    "block_axis": ("in", "out"),
    "train_core": ("small", "large", "both"),
    "singular_values": ("train", "freeze", "merge_frozen", "merge_trained", "split"),
    "basis": ("svd", "qr", "random"),
    "form": ("base", "core"),
    "quantize_core": (None, "nf4"),
    "bias": ("none", "all", "fura_only"),
    "core_dtype": (None, "float32", "bfloat16", "float16"),
}
BUILT = {  # settings of which only some choices exist so far; the others are refused with this list
    "block_axis": ("in",),
    "train_core": ("small",),
    "singular_values": ("train",),
    "basis": ("svd",),
    "form": ("base",),
    "quantize_core": (None,),
    "core_dtype": (None, "float32"),
}
NAMED_BLOCK_SIZES = ("auto", "head", "full")


@dataclass
class FuraConfig(PeftConfig):
    """Configuration of FuRA: full-rank fine-tuning with spectral preconditioning (arXiv 2605.22869).

    Each adapted weight W (out, in) is cut into column blocks with thin SVDs U diag(S) V^T; the small cores R = V^T and
    the singular values S are trained, U stays frozen.  In base form W itself is the frozen matrix, so the output at
    the start is bit for bit the base model's.

    Args:
        target_modules: names or regex of the modules to adapt, or "all-linear"; where None, the paper's seven
            projections for decoder models with those names, else PEFT's default for the architecture.
        block_axis: "in" cuts W into column blocks (the paper's `output_one_block`), "out" into row blocks.
        block_size: columns per block; "auto" is the factor pair closest to a square, "full" one block (the paper's
            SVD baseline), "head" one block per attention head.
        train_core: which core is trained.
        singular_values: what happens to S.
        basis: where the frozen frame comes from.
        form: "base" keeps W as the frozen matrix, "core" stores the large core in its place.
        quantize_core: 4-bit storage of the frozen core.
        save_basis: store (V0, S0) in the adapter file.  With False the file halves, the basis is computed again at
            load and a changed base weight is refused by its singular values.
        core_dtype: dtype of the trained tensors; None follows PEFT (float32 unless `autocast_adapter_dtype=False`).
        init_weights: False starts from a small random update, for tests.

    Raises:
        ValueError: for an unknown choice, or one that is not built yet.
    """

    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names or regex of the modules to adapt, or 'all-linear'."}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names or regex of modules to leave alone."}
    )
    block_axis: Literal["in", "out"] = field(
        default="in", metadata={"help": "Cut the weight into column blocks ('in') or row blocks ('out')."}
    )
    block_size: int | str = field(default="auto", metadata={"help": "Block size: an int, 'auto', 'head' or 'full'."})
    train_core: Literal["small", "large", "both"] = field(
        default="small", metadata={"help": "Which core is trained: 'small', 'large' or 'both'."}
    )
    singular_values: Literal["train", "freeze", "merge_frozen", "merge_trained", "split"] = field(
        default="train",
        metadata={"help": "Singular values: 'train', 'freeze', 'merge_frozen', 'merge_trained' or 'split'."},
    )
    basis: Literal["svd", "qr", "random"] = field(
        default="svd", metadata={"help": "Basis of the frozen core: 'svd', 'qr' or 'random'."}
    )
    form: Literal["base", "core"] = field(default="base", metadata={"help": "Frozen matrix: 'base' or 'core'."})
    quantize_core: Literal["nf4"] | None = field(
        default=None, metadata={"help": "Store the frozen core in 4 bits: None or 'nf4'."}
    )
    save_basis: bool = field(default=True, metadata={"help": "Store the spectral basis in the adapter file."})
    core_dtype: str | None = field(default=None, metadata={"help": "dtype of the trained tensors; None follows PEFT."})
    bias: str = field(default="none", metadata={"help": "Biases to train: 'none', 'all' or 'fura_only'."})
    init_weights: bool = field(default=True, metadata={"help": "False starts from a small random update (tests)."})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules to train and save whole, e.g. a classification head."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Only these layer indices; needs target_modules as a list."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the layer list, where it is not one of the common ones."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = FuraPeftType.FURA
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        self._check()

    def _check(self) -> None:
        """Collect every fault of the settings and raise once."""
        faults = [
            f"{name}={getattr(self, name)!r} is not one of {', '.join(map(repr, choices))}"
            for name, choices in CHOICES.items()
            if getattr(self, name) not in choices
        ]
        faults += [
            f"{name}={getattr(self, name)!r} is not built yet; use {' or '.join(map(repr, BUILT[name]))}"
            for name, choices in CHOICES.items()
            if getattr(self, name) in choices and getattr(self, name) not in BUILT.get(name, choices)
        ]
        faults += self._block_size_faults()
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            faults.append("layers_to_transform needs target_modules as a list of names, not as a regex string")
        if self.layers_pattern and self.layers_to_transform is None:
            faults.append("layers_pattern is set but layers_to_transform is not; set both or neither")
        if faults:
            raise ValueError("FuraConfig: " + "; ".join(faults))

    def _block_size_faults(self) -> list[str]:
        size = self.block_size
        if isinstance(size, str) and size == "head":
            return ["block_size='head' is not built yet; give the head dimension as an int"]
        named = isinstance(size, str) and size in NAMED_BLOCK_SIZES
        positive = isinstance(size, int) and not isinstance(size, bool) and size > 0
        if named or positive:
            return []
        return [f"block_size={size!r} is neither a positive int nor one of 'auto', 'full', 'head'"]
