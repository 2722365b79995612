"""A teacher in this process: a transformers model whose forward pass feeds `capture` chunk by chunk.

Promise: signals are those of `model(input_ids).logits`, truncated to the dataset's vocabulary before the softmax.
The full [tokens, vocabulary] logits are never made where the output head can be replayed (`stages.models.heads`).

Each segment of a row is run as if it were alone (`stages.models.segments`).

Shapes: B rows, T tokens, N = B · T, X width of what is kept of a position, V vocabulary of the dataset.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stages.models.heads import Head, observe_head
from stages.teach.capture import Signals, capture, chunk_rows, join

HEAD_TOKENS = 512
"""Tokens in one product with the head: enough for the product to run at full speed (measured on two CPU cores)."""


@dataclass(slots=True)
class LocalTeacher:
    """A loaded model, and the buffers that its captures share."""

    model: Any
    vocabulary: int
    k: int
    temperatures: tuple[float, ...]
    _head: Head | None = None
    _logits_NV: Tensor | None = None
    _work: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """The device that the model lies on."""
        device: torch.device = self.model.device
        return device

    @property
    def whole_rows(self) -> bool:
        """Whether rows go through the model whole; where not, each segment is run as a row of its own."""
        return self._head is None or self._head.whole_rows

    @torch.inference_mode()
    def signals(self, input_ids_BT: Tensor, positions_BT: Tensor) -> Signals:
        """Run the teacher over rows of tokens and keep signals of every position, [B · T], on the CPU.

        Args:
            input_ids_BT: any integers.
            positions_BT: of each token within its segment.
        """
        ids, positions = (
            each.to(self.device, dtype=torch.long, non_blocking=True) for each in (input_ids_BT, positions_BT)
        )
        if self._head is None:
            self._head = observe_head(self.model, ids, self.vocabulary)
        return self._reduce(self._head, self._head.states(self.model, ids, positions))

    def _reduce(self, head: Head, states_NX: Tensor) -> Signals:
        """Make logits and capture them chunk by chunk."""
        rows = chunk_rows(self.vocabulary, self.device.type)
        outer = max(rows, HEAD_TOKENS)
        if self._work is None:
            self._work = torch.empty(2, rows, self.vocabulary, device=self.device)
            self._logits_NV = (
                states_NX.new_empty(outer, self.vocabulary, dtype=torch.float32) if head.is_replayed else None
            )
        parts = []
        for first in range(0, len(states_NX), outer):
            part_NX = states_NX[first : first + outer]
            out = None if self._logits_NV is None else self._logits_NV[: len(part_NX)]
            logits_NV = head.logits(part_NX, out)
            for start in range(0, len(logits_NV), rows):
                chunk_NV = logits_NV[start : start + rows]
                parts.append(capture(chunk_NV, self.k, self.temperatures, work=self._work))
        found = join(parts)
        return found if self.device.type == "cpu" else _to_cpu(found)


def _to_cpu(signals: Signals) -> Signals:
    return Signals(
        ids_NK=signals.ids_NK.cpu(),
        log_probs_NK=signals.log_probs_NK.cpu(),
        tail_log_mass_N=signals.tail_log_mass_N.cpu(),
        log_partitions_NC=signals.log_partitions_NC.cpu(),
        finite_N=signals.finite_N.cpu(),
    )
