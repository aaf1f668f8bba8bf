"""`FuraConfig`: every setting of FuRA, in PEFT's style.  Meaningless combinations are refused, with the reason."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass, field
from typing import Any, Literal

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
        block_size: size of a block along that axis; "auto" is the factor pair closest to a square, "full" one block
            (the paper's SVD baseline), "head" one block per attention head, and "auto" where that does not divide.
        block_size_pattern, block_axis_pattern: exceptions by module name or regex, as PEFT's `rank_pattern`.
        train_core: "small" trains R (L of row blocks), "large" the other one, "both" both; the last two need the
            core form.
        singular_values: "train" S apart, "freeze" it, merge it into the frozen or the trained core, or "split" its
            square root into both.
        basis: "svd", "qr" (no S) or "random" (a random orthonormal large core with the small one fitted to W).
        form: "base" keeps W as the frozen matrix, "core" stores the large core in its place.
        quantize_core: "nf4" stores the frozen large core in 4 bits (QFuRA); needs the core form.
        save_basis: store the basis in the adapter file.  With False the file halves, the basis is computed again at
            load and a changed base weight is refused by its singular values.
        core_dtype: dtype of the trained tensors; None follows PEFT (float32 unless `autocast_adapter_dtype=False`).
        bias: "none", "all" or "fura_only": which biases are trained too.
        init_weights: False starts from a small random update, for tests.

    Raises:
        ValueError: for unknown choices and impossible combinations, all in one message.
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
    block_size_pattern: dict[str, int | str] = field(
        default_factory=dict, metadata={"help": "Module name or regex -> block size, where it differs."}
    )
    block_axis_pattern: dict[str, str] = field(
        default_factory=dict, metadata={"help": "Module name or regex -> block axis, where it differs."}
    )
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

    target_parameters: list[str] | None = field(
        default=None, metadata={"help": "Refused: FuRA adapts modules, not bare parameters such as fused experts."}
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
        patterns = {name: getattr(self, name) for name in ("block_size_pattern", "block_axis_pattern")}
        faults += [
            f"{name}={value!r} is not a dict from module names to values; leave it out, or give {{}}"
            for name, value in patterns.items()
            if not isinstance(value, dict)
        ]
        size_pattern, axis_pattern = (value if isinstance(value, dict) else {} for value in patterns.values())
        sizes = {"block_size": self.block_size} | {
            f"block_size_pattern[{name!r}]": size for name, size in size_pattern.items()
        }
        faults += [fault for name, size in sizes.items() for fault in block_size_faults(name, size)]
        faults += [
            f"block_axis_pattern[{name!r}]={axis!r} is not one of 'in', 'out'"
            for name, axis in axis_pattern.items()
            if axis not in CHOICES["block_axis"]
        ]
        faults += self._regex_faults(size_pattern, axis_pattern)
        faults += self._combination_faults()
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            faults.append("layers_to_transform needs target_modules as a list of names, not as a regex string")
        if self.layers_pattern and self.layers_to_transform is None:
            faults.append("layers_pattern is set but layers_to_transform is not; set both or neither")
        if faults:
            raise ValueError("FuraConfig: " + "; ".join(faults))

    def _regex_faults(self, size_pattern: dict[str, Any], axis_pattern: dict[str, Any]) -> list[str]:
        """Every regular expression among the settings, read as PEFT reads it."""
        patterns = {"block_size_pattern": size_pattern, "block_axis_pattern": axis_pattern}
        given = [(f"a key of {name}", key, rf"(.*\.)?({key})$") for name, keys in patterns.items() for key in keys]
        for name in ("target_modules", "exclude_modules"):
            if isinstance(value := getattr(self, name), str):
                given.append((name, value, value))
        return [fault for name, value, read in given for fault in regex_faults(name, value, read)]

    def _combination_faults(self) -> list[str]:
        rules = [
            (
                self.basis != "svd" and self.singular_values != "merge_trained",
                f"basis={self.basis!r} has no singular values to keep apart, so singular_values="
                f"{self.singular_values!r} has no meaning; use singular_values='merge_trained'",
            ),
            (
                self.basis != "svd" and self.train_core != "small",
                f"basis={self.basis!r} trains the small core; use train_core='small'",
            ),
            (
                self.basis != "svd" and not self.save_basis,
                f"save_basis=False recognizes its base weight by singular values, which basis={self.basis!r} lacks; "
                "use save_basis=True",
            ),
            (
                self.basis == "random" and self.form == "base",
                "basis='random' does not span the base weight, which the base form multiplies; use form='core'",
            ),
            (
                self.form == "base" and self.train_core != "small",
                f"form='base' holds no large core that train_core={self.train_core!r} could train; use form='core'",
            ),
            (
                self.train_core == "both" and self.singular_values in ("merge_frozen", "merge_trained"),
                f"train_core='both' leaves no core that singular_values={self.singular_values!r} could mean; "
                "use 'train', 'freeze' or 'split'",
            ),
            (
                self.quantize_core is not None and self.form == "base",
                f"quantize_core={self.quantize_core!r} needs form='core'; for FuRA on a quantized base model load "
                "that model and leave quantize_core out",
            ),
            (
                self.quantize_core is not None and self.train_core != "small",
                f"quantize_core={self.quantize_core!r} freezes the large core, so train_core={self.train_core!r} "
                "cannot train it; use train_core='small'",
            ),
            (
                self.target_parameters is not None,
                f"target_parameters={self.target_parameters}: FuRA adapts linear modules, not bare parameters such as "
                "fused experts; use target_modules",
            ),
        ]
        return [fault for broken, fault in rules if broken]


def block_size_faults(name: str, size: int | str) -> list[str]:
    """What is wrong with a block size, for a message; empty where nothing is."""
    named = isinstance(size, str) and size in NAMED_BLOCK_SIZES
    positive = isinstance(size, int) and not isinstance(size, bool) and size > 0
    if named or positive:
        return []
    return [f"{name}={size!r} is neither a positive int nor one of 'auto', 'full', 'head'"]


def regex_faults(name: str, value: str, read: str) -> list[str]:
    """What is wrong with a regular expression, for a message; `read` is what will be compiled for `value`."""
    try:
        re.compile(read)
    except re.error as error:
        return [
            f"{name}, {value!r}, is no regular expression ({error.msg}); give a module's name, or e.g. '.*_proj' for "
            "all that end in _proj"
        ]
    return []
