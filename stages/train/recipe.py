"""How the weights are moved, as values: the optimizer's settings and the learning rate as a function of the step.

Does not: import torch; `optimizer` builds what these describe.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from stages.contract import Config

__all__ = ["AdamW", "Decay", "Muon", "OptimizerSettings", "Recipe", "Validation"]

Decay = Literal["cosine", "linear"]
"""How the learning rate falls after the warm-up. Cosine is the habit (arXiv:2203.15556); linear to zero ends lower at
few tokens a parameter (arXiv:2502.15938)."""


class AdamW(Config):
    """Decoupled weight decay (arXiv:1711.05101) for every tensor; only matrices that are no embeddings are decayed."""

    kind: Literal["adamw"] = "adamw"
    learning_rate: float = Field(1e-3, gt=0)
    """Peak rate; 1e-3 suits fresh models of some million weights, 1e-5 to 1e-4 checkpoints of billions."""
    weight_decay: float = Field(0.1, ge=0)
    """Of matrices; vectors and embeddings are not decayed (arXiv:2005.14165, B)."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """Decay rates of the moments: those in use for language models since GPT-3 (arXiv:2005.14165, B)."""


class Muon(Config):
    """`torch.optim.Muon` for the matrices of hidden layers, AdamW for all else: embeddings, head, norms, biases.

    Each update of a matrix is orthogonalized, then scaled to the size that AdamW's would have (arXiv:2502.16982), so
    that rates and decays found for AdamW are where to start. What is stacked in three dimensions (the experts of some
    mixtures) is AdamW's too.
    """

    kind: Literal["muon"] = "muon"
    learning_rate: float = Field(1e-2, gt=0)
    """Peak rate of the matrices; 1e-2 suits fresh models of some million weights (`benchmarks/RESULTS.md`)."""
    rest_learning_rate: float | None = Field(None, gt=0)
    """Peak rate of all else; None is the same."""
    momentum: float = Field(0.95, ge=0, lt=1)
    """Of the matrices' gradients (Nesterov)."""
    weight_decay: float = Field(0.1, ge=0)
    """Of matrices; vectors and embeddings are not decayed."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """Decay rates of AdamW's moments."""


OptimizerSettings = Annotated[AdamW | Muon, Field(discriminator="kind")]
"""Either of them."""


class Validation(Config):
    """The loss on text that is not trained on, as training goes on: cross-entropy, whatever is learned.

    The text is the dataset's calibration split. Never its validation split, on which models are compared: weights that
    were chosen there would be compared on what they were chosen by.
    """

    times: int = Field(10, ge=1)
    """How often, evenly over the steps; the last time after the last step."""
    max_tokens: int = Field(32_768, ge=1)
    """Tokens of whole rows that are read each time, the same each time."""
    patience: int | None = Field(None, ge=1)
    """Ends training after so many times without a new best; None never does."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the weights are moved."""

    optimizer: AdamW | Muon
    optimizer_steps: int
    warmup_fraction: float
    decay: Decay
    final_fraction: float
    gradient_clip: float
    max_skipped_fraction: float
    dtype: str
    seed: int

    def rate_fraction_at(self, step: int) -> float:
        """Return the share of the peak rate at a step: a linear warm-up, then the decay to `final_fraction`.

        A cosine reaches it with the last step; a line that ends at zero would reach it one step later, so that the last
        step still learns.
        """
        warmup = math.ceil(self.warmup_fraction * self.optimizer_steps)
        if step < warmup:
            return (step + 1) / warmup
        left = self.optimizer_steps - warmup
        if self.decay == "linear":
            falling = 1 - (step - warmup) / max(1, left)
        else:
            falling = 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, left - 1))))
        return self.final_fraction + (1 - self.final_fraction) * max(0.0, falling)
