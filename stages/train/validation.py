"""The loss on held-out text while a student is trained.

Promise: the same rows each time, a function of the seed alone; every rank takes its share and all get the same number.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stages.ops.divergences import chunked_sum, cross_entropy
from stages.train.batches import MicroBatch, StepBatch
from stages.train.forward import student_outputs
from stages.train.reader import Reader


@dataclass(slots=True)
class HeldOutText:
    """Some rows of held-out text, read once."""

    reader: Reader
    num_batches: int
    vocabulary: int
    """Tokens of the dataset."""
    dtype: str
    """What the student's forward pass computes in."""
    whole_rows: bool = True
    """Whether the student keeps the segments of a row apart by itself."""
    _batches: Sequence[StepBatch] = field(default_factory=tuple)

    @torch.no_grad()
    def cross_entropy(self, model: Any, device: torch.device) -> float:
        """Return a model's mean cross-entropy, nats per target; not finite where its logits are not."""
        self._batches = self._batches or tuple(self.reader.steps(0, self.num_batches))
        total = torch.zeros(1, dtype=torch.float64, device=device)
        was_training = model.training
        model.eval()
        for batch in (each.to(device) for step in self._batches for each in step.micro_batches):
            found = student_outputs(model, batch, self.dtype, whole_rows=self.whole_rows)
            total += self._sum(found.values_NX[:, : self.vocabulary], batch)
        model.train(was_training)
        if self.reader.world_size > 1:
            torch.distributed.all_reduce(total)
        return float(total) / max(1, sum(step.num_targets for step in self._batches))

    def _sum(self, logits_NV: Tensor, batch: MicroBatch) -> Tensor:
        def term(values: tuple[Tensor, ...], rows: slice) -> tuple[Tensor, ...]:
            return (cross_entropy(values[0], batch.targets_M[rows]).sum(),)

        return chunked_sum([logits_NV], batch.positions_M, term)[1].double()
