"""How the weights are moved: the recipe, the optimizer, and its state as named tensors.

Promise: the learning rate is a function of the step; what `state_tensors` returns and `load_state_tensors` puts back is
all that the optimizer and the weights have.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

BETAS = (0.9, 0.95)
"""AdamW's decay rates: those in use for language models since GPT-3 (arXiv:2005.14165, B)."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the weights are moved."""

    optimizer_steps: int
    learning_rate: float
    warmup_fraction: float
    final_fraction: float
    weight_decay: float
    gradient_clip: float
    dtype: str
    seed: int

    def learning_rate_at(self, step: int) -> float:
        """Return the rate of a step: a linear warm-up, then a cosine down to `final_fraction` of the peak."""
        warmup = math.ceil(self.warmup_fraction * self.optimizer_steps)
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        done = (step - warmup) / max(1, self.optimizer_steps - 1 - warmup)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        return self.learning_rate * (self.final_fraction + (1 - self.final_fraction) * cosine)


def build_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """Return a fused AdamW; vectors (norms, biases) are not decayed."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=BETAS, fused=True)


def state_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return weights and the optimizer's state by name."""
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        found[f"weights/{name}"] = parameter
        for key, value in optimizer.state.get(parameter, {}).items():
            found[f"{key}/{name}"] = value
    return found


def load_state_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put a snapshot's tensors back."""
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            parameter.copy_(tensors[f"weights/{name}"])
        for key in ("step", "exp_avg", "exp_avg_sq"):
            if f"{key}/{name}" in tensors:
                optimizer.state[parameter][key] = tensors[f"{key}/{name}"].to(parameter.device)
