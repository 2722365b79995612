"""What one optimizer step works on: micro-batches of rows, their targets, and the teacher's stored signals at them.

Shapes: B rows, T tokens, M targets (unmasked tokens) of a micro-batch, N some of them, K kept entries, C temperatures.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class StoredSignals:
    """A teacher's stored signals at each target; a column that no objective reads is empty."""

    ids_MK: Tensor
    log_probs_MK: Tensor
    tail_log_mass_M: Tensor
    log_partitions_MC: Tensor
    temperatures: tuple[float, ...]
    """Those that the columns of `log_partitions` stand for."""

    def at(self, rows: slice) -> "StoredSignals":
        """Return the signals of some of the targets."""
        return StoredSignals(
            self.ids_MK[rows],
            self.log_probs_MK[rows],
            self.tail_log_mass_M[rows],
            self.log_partitions_MC[rows],
            self.temperatures,
        )


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rows of one forward pass."""

    input_ids_BT: Tensor
    """int64."""
    position_ids_BT: Tensor
    """int64: of each token within its segment."""
    positions_M: Tensor
    """int64: rows of the flattened logits [B · T, V] that predict a target."""
    targets_M: Tensor
    """int64: the tokens that they predict."""
    signals: StoredSignals | None

    def to(self, device: torch.device) -> "MicroBatch":
        """Copy to a device without waiting for it; on the CPU this is the same batch."""
        return self if device.type == "cpu" else _moved(self, device)


@dataclass(frozen=True, slots=True)
class StepBatch:
    """What one rank does in one optimizer step."""

    micro_batches: tuple[MicroBatch, ...]
    num_targets: int
    """Targets of the global batch, over all ranks: what the sum of losses is divided by."""
    num_tokens: int
    """Tokens of the global batch."""


def _moved(value: Any, device: torch.device) -> Any:
    """Copy each tensor of a dataclass to a device."""
    changed = {}
    for field in fields(value):
        item = getattr(value, field.name)
        if isinstance(item, Tensor):
            changed[field.name] = item.pin_memory().to(device, non_blocking=True)
        elif isinstance(item, StoredSignals):
            changed[field.name] = _moved(item, device)
    return replace(value, **changed)
