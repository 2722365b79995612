"""The optimizers that a recipe describes, which tensors each of them moves, and their state as named tensors.

Promise: every trainable tensor is moved by exactly one optimizer; what `state_tensors` returns and `load_state_tensors`
puts back is all that the optimizers and the weights have.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stages.train.recipe import AdamW, Recipe

STATE = ("step", "exp_avg", "exp_avg_sq", "momentum_buffer")
"""What AdamW and Muon keep of a tensor."""


def build_optimizers(model: Any, recipe: Recipe) -> tuple[torch.optim.Optimizer, ...]:
    """Return the optimizers of a model's tensors; each group knows its peak rate as `peak`."""
    settings = recipe.optimizer
    hidden, decayed, free = _sorted_parameters(model)
    if isinstance(settings, AdamW):
        return (_adamw(settings.learning_rate, settings.betas, (hidden + decayed, settings.weight_decay), (free, 0.0)),)
    rate = settings.rest_learning_rate or settings.learning_rate
    rest = _adamw(rate, settings.betas, (decayed, settings.weight_decay), (free, 0.0))
    if not hidden:
        return (rest,)
    peak = settings.learning_rate
    muon = torch.optim.Muon(
        [{"params": hidden, "peak": peak}],
        lr=peak,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    return muon, rest


def _adamw(rate: float, betas: tuple[float, float], *groups: tuple[list[nn.Parameter], float]) -> torch.optim.Optimizer:
    chosen: Iterable[dict[str, Any]] = (
        {"params": parameters, "weight_decay": decay, "peak": rate} for parameters, decay in groups if parameters
    )
    return torch.optim.AdamW(list(chosen), lr=rate, betas=betas, fused=True)


def _sorted_parameters(model: Any) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """Return (matrices of hidden layers, what else is decayed, what is not); a head may be an embedding too."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    layer = model.get_output_embeddings()
    head = {id(parameter) for parameter in layer.parameters()} if layer is not None else set()
    hidden, decayed, free = [], [], []
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if parameter.dim() < 2 or id(parameter) in embeddings:
            free.append(parameter)
        elif parameter.dim() > 2 or id(parameter) in head:
            decayed.append(parameter)
        else:
            hidden.append(parameter)
    return hidden, decayed, free


def set_rates(optimizers: Sequence[torch.optim.Optimizer], fraction: float) -> None:
    """Set every group's rate to a share of its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = fraction * group["peak"]


def state_tensors(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Return weights and the optimizers' state by name."""
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        found[f"weights/{name}"] = parameter
        for optimizer in optimizers:
            # `state` makes an entry for what it is asked by index: AdamW would take an empty one for a state.
            for key, value in optimizer.state.get(parameter, {}).items():
                found[f"{key}/{name}"] = value
    return found


def load_state_tensors(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], tensors: Mapping[str, Tensor]
) -> None:
    """Put a snapshot's tensors back."""
    owners = {id(p): o for o in optimizers for group in o.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            parameter.copy_(tensors[f"weights/{name}"])
        kept = {key: tensors[f"{key}/{name}"] for key in STATE if f"{key}/{name}" in tensors}
        if kept:
            owners[id(parameter)].state[parameter] = {key: value.to(parameter.device) for key, value in kept.items()}
