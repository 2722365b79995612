"""What a training has done so far: counts, curves, the loss on held-out text. Goes into snapshots as plain JSON."""

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

__all__ = ["Progress"]


@dataclass(slots=True)
class Progress:
    """What has been done so far."""

    step: int = 0
    targets: int = 0
    tokens: int = 0
    seconds: float = 0.0
    skipped: int = 0
    """Steps whose gradient was not finite: they changed nothing."""
    skipped_in_a_row: int = 0
    last: dict[str, float] = field(default_factory=dict)
    """The newest point of the curves."""
    pending: list[tuple[int, int, Tensor | list[float]]] = field(default_factory=list)
    """(step, targets, sums of losses over all ranks) of each step since that point; of a snapshot as plain numbers."""
    held_out: float | None = None
    """The newest cross-entropy on held-out text, nats per target."""
    best_held_out: float | None = None
    best_step: int = 0
    """Steps after which that was measured."""
    times_without_best: int = 0
    """Times that held-out text was looked at since."""
    is_stopped: bool = False
    """Whether patience ended it."""

    def facts(self) -> dict[str, Any]:
        """Return all but the step as plain JSON, from which the same progress can be made."""
        sums = [
            (step, targets, torch.as_tensor(sums, dtype=torch.float64).tolist()) for step, targets, sums in self.pending
        ]
        kept = {name: value for name, value in asdict(replace(self, pending=[])).items() if name != "step"}
        return {**kept, "pending": sums}

    def count_validation(self, held_out: float, *, patience: int | None) -> bool:
        """Count a look at held-out text; return whether these weights are the best so far."""
        self.held_out = held_out
        is_best = math.isfinite(held_out) and (self.best_held_out is None or held_out < self.best_held_out)
        if is_best:
            self.best_held_out, self.best_step, self.times_without_best = held_out, self.step, 0
        else:
            self.times_without_best += 1
        self.is_stopped = patience is not None and self.times_without_best >= patience
        return is_best
