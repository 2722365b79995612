"""How far a quantized model's predictions are from those of the model that it was made from.

The unquantized model is run once, and its `BasePredictions` shared by every trial: its states and its output head, from
which any process gets its log-probabilities back (`stages.models.heads`).

Promises: KL(unquantized ‖ quantized) in nats per token, over the dataset's vocabulary, in float32, at positions that
predict a target only; the same rows for every trial; a KL that is not a number is an error.

Shape letters: R rows, T tokens of a row, N measured positions, V vocabulary of the dataset.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stages.errors import StageFailed
from stages.formats.tokens import TokenRows, predicts
from stages.models.heads import PackedHead, PackedTensor, log_prob_chunks, observe_head
from stages.ops.divergences import kl_divergence

LOGITS_BUDGET_BYTES = 512 * 1024 * 1024
"""Logits of one forward pass where no micro-batch is given."""
MAX_MICRO_BATCH = 16
"""Rows of one forward pass where no micro-batch is given and the logits would allow more."""


@dataclass(frozen=True, slots=True)
class BasePredictions:
    """What the unquantized model predicts on the rows that are measured; picklable, shared without a copy."""

    rows: TokenRows
    head: PackedHead
    states: PackedTensor
    """Of each measured position, in the order of the rows."""


@dataclass(frozen=True, slots=True)
class Fidelity:
    """A model's distance to the one that it was made from."""

    kl: float
    """Mean KL(unquantized ‖ model), nats per token."""
    kl_p99: float
    """Its 99th percentile over tokens."""
    agreement: float
    """Fraction of tokens where both models' most likely token is the same."""
    num_tokens: int


def fitting_micro_batch(given: int | None, *, sequence_length: int, vocabulary_size: int) -> int:
    """Return the rows of one forward pass: those given, else as many as keep the logits within a budget."""
    if given is not None:
        return given
    return max(1, min(MAX_MICRO_BATCH, LOGITS_BUDGET_BYTES // (sequence_length * vocabulary_size * 4)))


def _batches(rows: TokenRows, micro_batch: int, device: str) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield (ids, positions within segments, which of them predict a target) of consecutive rows."""
    predicts_RT = predicts(rows.mask_RT)
    for start in range(0, len(rows), micro_batch):
        part = slice(start, start + micro_batch)
        yield (
            torch.tensor(rows.ids_RT[part], dtype=torch.long, device=device),
            torch.tensor(rows.positions_RT[part], device=device),
            torch.tensor(predicts_RT[part], device=device),
        )


@torch.inference_mode()
def predict(model: Any, rows: TokenRows, *, vocabulary_size: int, micro_batch: int, device: str) -> BasePredictions:
    """Run the unquantized model once over the rows that are measured.

    Args:
        model: a causal language model, in evaluation mode on `device`.
        rows: the rows to measure on.
        vocabulary_size: entries of the dataset's vocabulary.
        micro_batch: rows of one forward pass.
        device: where the model is.
    """
    head = observe_head(model, torch.tensor(rows.ids_RT[:1], dtype=torch.long, device=device), vocabulary_size)
    num_positions, at = int(predicts(rows.mask_RT).sum()), 0
    states_NX = torch.empty(0)
    for ids_BT, positions_BT, chosen_BT in _batches(rows, micro_batch, device):
        part_NX = head.states(model, ids_BT, positions_BT, chosen_BT)
        if at == 0:  # at once, since joining parts at the end would hold everything twice
            states_NX = torch.empty(num_positions, part_NX.shape[1], dtype=part_NX.dtype)
        states_NX[at : at + len(part_NX)] = part_NX
        at += len(part_NX)
    return BasePredictions(rows, head.pack(), PackedTensor.of(states_NX))


@torch.inference_mode()
def measure_fidelity(model: Any, base: BasePredictions, *, micro_batch: int, device: str) -> Fidelity:
    """Compare a model with the one that it was made from, on the same rows.

    Raises:
        StageFailed: the KL is not a finite number.
    """
    rows, base_head = base.rows, base.head.unpack(device)
    ids_BT = torch.tensor(rows.ids_RT[:1], dtype=torch.long, device=device)
    head = observe_head(model, ids_BT, base_head.vocabulary_size, whole_rows=base_head.whole_rows)
    kls: list[Tensor] = []
    agreed: list[Tensor] = []  # on the device, as `kls`: reading a figure would wait for it
    at = 0
    for ids_BT, positions_BT, chosen_BT in _batches(rows, micro_batch, device):
        states_NX = head.states(model, ids_BT, positions_BT, chosen_BT)
        base_NX = base.states.tensor(device, slice(at, at + len(states_NX)))
        at += len(states_NX)
        for _, (log_q_NV, log_p_NV) in log_prob_chunks((head, states_NX), (base_head, base_NX)):
            kls.append(kl_divergence(log_p_NV, log_q_NV))
            agreed.append(log_p_NV.argmax(-1) == log_q_NV.argmax(-1))
    kl_N = torch.cat(kls).double()
    mean = float(kl_N.mean())
    if not math.isfinite(mean):
        wrong = int((~kl_N.isfinite()).sum())
        raise StageFailed(
            f"the KL to the unquantized model is {mean} ({wrong} of {len(kl_N)} tokens); expected a finite number"
        )
    # `numpy.percentile` since `torch.quantile` refuses more than 16 million values.
    agreement = int(torch.cat(agreed).sum()) / len(kl_N)
    return Fidelity(mean, float(np.percentile(kl_N.cpu().numpy(), 99)), agreement, len(kl_N))
