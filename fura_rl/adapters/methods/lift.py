"""LIFT (arXiv 2506.00772): sparse fine-tuning of the principal weights.

The principal weights of W are the entries that are largest in magnitude in its best rank-`filter_rank` approximation.
Only they are updated, as many as a LoRA of rank `rank` has, and AdamW's moments are kept for them alone.  Every
`refresh_steps` steps they are chosen anew from the weights as they are by then; an entry that stays keeps its moments.
The method is an optimizer: the policy is a plain model and nothing is added to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from fura_rl.adapters.methods.method import AdapterMethod


class PrincipalWeightAdamW(torch.optim.Optimizer):
    """AdamW (decoupled weight decay) on the principal weights of every matrix.

    Args:
        params: matrices (out, in), or groups of them.
        rank: rank * (out + in) entries of each matrix are trained, never more than there are.
        filter_rank: rank of the approximation that chooses them.
        refresh_steps: the entries are chosen anew after this many steps.
        lr, betas, eps, weight_decay: as in `torch.optim.AdamW`.

    The state of a matrix is `index` (k,), `exp_avg` (k,) and `exp_avg_sq` (k,), k numbers each, and the step.

    Raises:
        ValueError: for a parameter that is not a matrix, or settings below 1.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        rank: int,
        filter_rank: int,
        refresh_steps: int,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        settings = {"rank": rank, "filter_rank": filter_rank, "refresh_steps": refresh_steps}
        if low := [f"{name}={value}" for name, value in settings.items() if value < 1]:
            raise ValueError(f"LIFT needs {', '.join(low)} to be at least 1")
        defaults = settings | {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        shapes = [tuple(p.shape) for group in self.param_groups for p in group["params"] if p.ndim != 2]
        if shapes:
            raise ValueError(f"LIFT trains matrices only, not a parameter of shape {shapes[0]}")

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state |= {"step": 0, **fresh_moments(parameter, group)}
        elif state["step"] % group["refresh_steps"] == 0:
            state |= carried_moments(state, fresh_moments(parameter, group))
        state["step"] += 1
        (beta1, beta2), step, index = group["betas"], state["step"], state["index"]
        gradient = parameter.grad.reshape(-1)[index].float()
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        mean = state["exp_avg"] / (1 - beta1**step)
        scale = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt() + group["eps"]
        flat = parameter.data.view(-1)
        kept = flat[index].float() * (1 - group["lr"] * group["weight_decay"])
        flat[index] = (kept - group["lr"] * mean / scale).to(flat.dtype)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which casts every state tensor to the parameter's dtype: indices and moments keep theirs."""
        super().load_state_dict(state_dict)
        parameters = [p for group in self.param_groups for p in group["params"]]
        for position, saved in state_dict["state"].items():
            parameter = parameters[position]
            self.state[parameter] |= {
                name: value.detach().clone().to(parameter.device)
                for name, value in saved.items()
                if isinstance(value, torch.Tensor)
            }


def trained_entries(shape: tuple[int, ...], rank: int) -> int:
    """How many entries of a matrix are trained: as many as a LoRA of this rank has."""
    return min(rank * (shape[0] + shape[1]), shape[0] * shape[1])


def principal_weights(weight: torch.Tensor, filter_rank: int, count: int) -> torch.Tensor:
    """Sorted flat indices (count,) of the entries largest in magnitude in the rank-`filter_rank` approximation."""
    left, values, right = torch.linalg.svd(weight.float(), full_matrices=False)
    approximation = (left[:, :filter_rank] * values[:filter_rank]) @ right[:filter_rank]
    return approximation.abs().flatten().topk(count).indices.sort().values


def fresh_moments(parameter: nn.Parameter, group: dict[str, Any]) -> dict[str, torch.Tensor]:
    count = trained_entries(tuple(parameter.shape), group["rank"])
    index = principal_weights(parameter.data, group["filter_rank"], count)
    zeros = torch.zeros(count, dtype=torch.float32, device=parameter.device)
    return {"index": index, "exp_avg": zeros, "exp_avg_sq": zeros.clone()}


def carried_moments(old: dict[str, Any], new: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`new` with the moments of every entry that was trained before."""
    place = torch.searchsorted(old["index"], new["index"]).clamp_max_(len(old["index"]) - 1)
    stays = old["index"][place] == new["index"]
    for name in ("exp_avg", "exp_avg_sq"):
        new[name][stays] = old[name][place[stays]]
    return new


def lift_optimizer(args: TrainingArguments, settings: dict[str, Any]) -> tuple[type, dict[str, Any]]:
    """What `Trainer.optimizer_cls_and_kwargs` wants; weight decay comes with the trainer's groups."""
    adam = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    return PrincipalWeightAdamW, adam | settings


def train_only(policy: nn.Module, target_modules: list[str]) -> None:
    """Let gradients reach the weights of the named linear layers alone.

    Raises:
        ValueError: where the policy has none of them.
    """
    policy.requires_grad_(False)
    chosen = [
        module
        for name, module in policy.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in target_modules
    ]
    if not chosen:
        raise ValueError(f"adapter_target_modules={target_modules} name no linear layer of the model")
    for module in chosen:
        module.weight.requires_grad_(True)


def count_entries(policy: nn.Module, settings: dict[str, Any]) -> int:
    return sum(trained_entries(tuple(p.shape), settings["rank"]) for p in policy.parameters() if p.requires_grad)


METHOD = AdapterMethod(
    config_class=None,
    summary="the entries that are largest after rank reduction",
    paper="arXiv 2506.00772",
    paper_learning_rate=1e-4,
    rate_of="its code (LLaMA-2-7B, mathematics)",
    limits="dense gradients and whole checkpoints: what is saved is optimizer state; an SVD of every weight at each "
    "refresh; no adapter to switch off, no quantized base",
    settings=lambda model_args: {"rank": model_args.lora_r},
    capacity="rank",
    optimizer=lift_optimizer,
    optimizer_settings={"rank": 16, "filter_rank": 64, "refresh_steps": 200},
    freeze=train_only,
    count=count_entries,
)
