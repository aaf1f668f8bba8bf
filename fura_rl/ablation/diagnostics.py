"""How far a trained policy is from its base, and along which directions: KL on completions, spectra of the update.

Both are measured against the base checkpoint read anew, for every method alike: some methods move the base weight they
sit on, some quantize it, and full fine-tuning keeps none.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from fura_rl.data import encode_prompts
from fura_rl.sync.fold import checkpoint_weights

TOKENS_PER_BATCH = 16_384  # of logits held at once, on both sides
DIRECTIONS = 8  # leading singular directions whose overlap is measured
SPECTRUM = 64  # leading singular values that are kept for the plot


@dataclass(frozen=True)
class Divergence:
    """KL(policy || base) in nats, over the whole vocabulary at every token of completions that the policy sampled.

    `per_completion` sums over a completion, the mean over completions: with prefixes from the policy itself it has no
    bias as the KL between the two distributions over completions.
    """

    per_token: float
    per_completion: float
    completions: int


@torch.no_grad()
def divergence(
    policy: nn.Module, base: nn.Module, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
) -> Divergence:
    """The KL of `policy` to `base` on token ids; `completions[i]` follows `prompts[i]`.

    Raises:
        ValueError: where no completion has a token.
    """
    pairs = [(list(p), list(c)) for p, c in zip(prompts, completions, strict=True) if c]
    if not pairs:
        raise ValueError("the KL to the base needs a completion with at least one token")
    training = policy.training
    policy.eval()
    base.eval()
    sums = []
    for batch in batches(sorted(pairs, key=lambda pair: len(pair[0]) + len(pair[1]))):
        sums += completion_kl(policy, base, batch)
    policy.train(training)
    tokens = sum(len(completion) for _, completion in pairs)
    return Divergence(sum(sums) / tokens, sum(sums) / len(pairs), len(pairs))


def batches(pairs: Sequence[tuple[list[int], list[int]]]) -> Iterator[list[tuple[list[int], list[int]]]]:
    """Runs of pairs, sorted by length, that hold at most TOKENS_PER_BATCH tokens with their padding."""
    batch: list[tuple[list[int], list[int]]] = []
    for prompt, completion in pairs:
        if batch and (len(batch) + 1) * (len(prompt) + len(completion)) > TOKENS_PER_BATCH:
            yield batch
            batch = []
        batch.append((prompt, completion))
    yield batch


def completion_kl(policy: nn.Module, base: nn.Module, batch: Sequence[tuple[list[int], list[int]]]) -> list[float]:
    """The sum over its tokens of the KL, for every pair of the batch; padded on the right, where nothing looks back."""
    width = max(len(prompt) + len(completion) for prompt, completion in batch)
    device = next(policy.parameters()).device
    ids = torch.zeros(len(batch), width, dtype=torch.long, device=device)
    seen = torch.zeros_like(ids)
    counted = torch.zeros(len(batch), width - 1, dtype=torch.bool, device=device)
    for row, (prompt, completion) in enumerate(batch):
        end = len(prompt) + len(completion)
        ids[row, :end] = torch.tensor(prompt + completion)
        seen[row, :end] = 1
        counted[row, len(prompt) - 1 : end - 1] = True  # the positions that predict the completion
    ours, theirs = (
        model(input_ids=ids, attention_mask=seen).logits[:, :-1][counted].float().log_softmax(-1)
        for model in (policy, base)
    )
    kl = (ours.exp() * (ours - theirs)).sum(-1)
    return [part.sum().item() for part in kl.split(counted.sum(dim=1).tolist())]


@dataclass(frozen=True)
class UpdateShape:
    """One module's update D = W' - W beside its base weight W.

    `relative_size` is |D| / |W| (Frobenius), `stable_rank` |D|^2 / s_1(D)^2, and `overlap`, in 0..1, the mean squared
    cosine between the spaces of the leading singular directions of D and of W, left and right (DIRECTIONS of them, or
    D's rank where that is smaller); `chance` is what random directions would give.  The spectra are singular values
    over the largest, at most SPECTRUM.
    """

    relative_size: float
    stable_rank: float
    overlap: float
    chance: float
    spectrum: list[float]
    base_spectrum: list[float]


@torch.no_grad()
def update_shape(update: torch.Tensor, base: torch.Tensor) -> UpdateShape | None:
    """The shape of `update` (out, in) against `base` of the same size, in float32; None where there is no update."""
    update, base = update.float(), base.float()
    if not update.any():
        return None
    u, values, v = torch.linalg.svd(update, full_matrices=False)
    base_u, base_values, base_v = torch.linalg.svd(base, full_matrices=False)
    rank = int((values > values[0] * max(update.shape) * torch.finfo(torch.float32).eps).sum())
    k = min(DIRECTIONS, rank)
    left, right = (base_u[:, :k].T @ u[:, :k]).square().sum() / k, (base_v[:k] @ v[:k].T).square().sum() / k
    return UpdateShape(
        relative_size=float(update.norm() / base.norm()),
        stable_rank=float(values.square().sum() / values[0].square()),
        overlap=float(left + right) / 2,
        chance=(k / update.shape[0] + k / update.shape[1]) / 2,
        spectrum=(values[:SPECTRUM] / values[0]).tolist(),
        base_spectrum=(base_values[:SPECTRUM] / base_values[0]).tolist(),
    )


@torch.no_grad()
def update_summary(policy: nn.Module, base: Mapping[str, torch.Tensor], targets: Sequence[str]) -> dict[str, Any]:
    """`UpdateShape` averaged over the `targets` modules, whichever way they are trained.

    `base` holds the base checkpoint's tensors by name.  Modules that did not move count in `relative_size` as 0 and
    take no part in the rest; all but `modules` and `relative_size` are None where none moved.
    """
    shapes = []
    for weight in checkpoint_weights(policy):
        if weight.name.endswith(".weight") and weight.module_name.rpartition(".")[2] in targets:
            value = weight.value().float()
            start = base[weight.name].to(value)
            shapes.append(update_shape(value - start, start))
    moved = [asdict(shape) for shape in shapes if shape is not None]
    size = sum(shape["relative_size"] for shape in moved) / len(shapes) if shapes else 0.0
    return {
        "modules": len(shapes),
        "relative_size": size,
        **{name: mean([s[name] for s in moved]) for name in ("stable_rank", "overlap", "chance")},
        **{name: mean_spectrum([s[name] for s in moved]) for name in ("spectrum", "base_spectrum")},
    }


def mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def mean_spectrum(spectra: Sequence[Sequence[float]]) -> list[float] | None:
    """Value by value over modules; a smaller matrix has no singular values beyond its side."""
    if not spectra:
        return None
    longest = max(map(len, spectra))
    return [statistics.fmean(s[i] for s in spectra if i < len(s)) for i in range(longest)]


def sampled_tokens(rows: Sequence[dict[str, Any]], tokenizer: Any) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of prompts and completions, the first of every problem's sampled pass, as `samples.jsonl` has them."""
    chosen = [row for row in rows if row["pass"] == "sampled" and row["sample"] == 0]
    return encode_prompts([row["prompt"] for row in chosen], tokenizer), [row["token_ids"] for row in chosen]
