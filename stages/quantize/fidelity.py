"""How far a quantized model's predictions are from those of the model that it was made from.

The unquantized model is run once, and its `Reference` shared by every trial: the vectors that enter its output head
(D numbers a token) and the head itself, from which any process gets the exact logits back. That is 31 times smaller
than log-probabilities for a vocabulary of 128,256 and a width of 4,096. A model whose logits are more than its head
times that vector (soft-capped, scaled) is found out by comparing, and its log-probabilities are kept instead.

Promises: KL(unquantized ‖ quantized) in nats per token, over the whole vocabulary, in float32, at positions that
predict a target only; the same rows for every trial; a KL that is not a number is an error.

Shape letters: R rows, T tokens of a row, N measured positions, D width of the head's input, V vocabulary.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from stages.errors import StageFailed
from stages.ops.divergences import kl_divergence
from stages.quantize.rows import Rows

CHUNK_POSITIONS = 512
"""Positions whose float32 log-probabilities are held at once: 512 × 128,256 × 4 B = 263 MB."""
LOGITS_BUDGET_BYTES = 512 * 1024 * 1024
"""Logits of one forward pass where no micro-batch is given."""
MAX_MICRO_BATCH = 16
"""Rows of one forward pass where no micro-batch is given and the logits would allow more."""


@dataclass(frozen=True, slots=True)
class Reference:
    """The unquantized model's predictions on the rows that are measured."""

    rows: Rows
    dtype: str
    """The dtype in which the model ran, and its head is applied."""
    hidden_ND: np.ndarray | None = None
    """Float32 inputs of the output head, at measured positions in the order of the rows."""
    head_VD: np.ndarray | None = None
    bias_V: np.ndarray | None = None
    log_probs_NV: np.ndarray | None = None
    """Float32; in place of the three above where they do not give the model's logits."""


@dataclass(frozen=True, slots=True)
class Fidelity:
    """A model's distance to its reference."""

    kl: float
    """Mean KL(reference ‖ model), nats per token."""
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


def _batches(rows: Rows, micro_batch: int, device: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (ids, which positions predict a target) of consecutive rows."""
    for start in range(0, len(rows), micro_batch):
        part = slice(start, start + micro_batch)
        yield (
            torch.tensor(rows.ids_RT[part], dtype=torch.long, device=device),
            torch.tensor(rows.predicts_RT[part], device=device),
        )


def _to_array(tensor: Tensor) -> np.ndarray:
    array: np.ndarray = tensor.detach().float().cpu().numpy()
    return array


@torch.no_grad()
def compute_reference(model: Any, rows: Rows, *, micro_batch: int, device: str) -> Reference:
    """Run the unquantized model once over the rows that are measured.

    Args:
        model: a causal language model, in evaluation mode on `device`.
        rows: the rows to measure on.
        micro_batch: rows of one forward pass.
        device: where the model is.
    """
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    head = model.get_output_embeddings()
    seen: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda _module, args: seen.append(args[0])) if head is not None else None
    hidden: list[np.ndarray] = []
    log_probs: list[np.ndarray] = []
    linear = head is not None
    try:
        for ids_BT, predicts_BT in _batches(rows, micro_batch, device):
            logits_NV = model(input_ids=ids_BT, use_cache=False).logits[predicts_BT]
            if linear and not hidden:
                again_NV = functional.linear(seen[-1][predicts_BT], head.weight, head.bias)
                # Both round, and not always alike: four units in the last place of the largest, or a thousandth of it.
                largest = max(1.0, float(logits_NV.abs().max()))
                apart = float((again_NV.float() - logits_NV.float()).abs().max())
                linear = apart <= max(1e-3, 4 * torch.finfo(logits_NV.dtype).eps) * largest
            if linear:
                hidden.append(_to_array(seen[-1][predicts_BT]))
            else:
                log_probs.append(_to_array(functional.log_softmax(logits_NV.float(), dim=-1)))
            seen.clear()
    finally:
        if hook is not None:
            hook.remove()
    if not linear:
        return Reference(rows, dtype, log_probs_NV=np.concatenate(log_probs))
    bias_V = _to_array(head.bias) if head.bias is not None else None
    return Reference(rows, dtype, hidden_ND=np.concatenate(hidden), head_VD=_to_array(head.weight), bias_V=bias_V)


class _Replay:
    """Gives the reference's log-probabilities back, position by position, in order."""

    def __init__(self, reference: Reference, device: str) -> None:
        self.reference, self.device, self.at = reference, device, 0
        self.dtype = getattr(torch, reference.dtype)
        self.head = None if reference.head_VD is None else self._tensor(reference.head_VD)
        self.bias = None if reference.bias_V is None else self._tensor(reference.bias_V)

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.tensor(array, device=self.device, dtype=self.dtype)

    def take(self, num: int) -> Tensor:
        """Return the next positions' log-probabilities, [num, V] float32."""
        part = slice(self.at, self.at + num)
        self.at += num
        if self.head is None:
            assert self.reference.log_probs_NV is not None
            return torch.tensor(self.reference.log_probs_NV[part], device=self.device)
        assert self.reference.hidden_ND is not None
        logits_NV = functional.linear(self._tensor(self.reference.hidden_ND[part]), self.head, self.bias)
        return functional.log_softmax(logits_NV.float(), dim=-1)


@torch.no_grad()
def measure_fidelity(model: Any, reference: Reference, *, micro_batch: int, device: str) -> Fidelity:
    """Compare a model with its reference on the reference's rows.

    Raises:
        StageFailed: the KL is not a finite number.
    """
    replay = _Replay(reference, device)
    kls: list[Tensor] = []
    agreed = 0
    for ids_BT, predicts_BT in _batches(reference.rows, micro_batch, device):
        logits_NV = model(input_ids=ids_BT, use_cache=False).logits[predicts_BT]
        for chunk_NV in logits_NV.split(CHUNK_POSITIONS):
            log_q_NV = functional.log_softmax(chunk_NV.float(), dim=-1)
            log_p_NV = replay.take(len(chunk_NV))
            kls.append(kl_divergence(log_p_NV, log_q_NV))
            agreed += int((log_p_NV.argmax(-1) == log_q_NV.argmax(-1)).sum())
    kl_N = torch.cat(kls).double()
    mean = float(kl_N.mean())
    if not math.isfinite(mean):
        wrong = int((~kl_N.isfinite()).sum())
        raise StageFailed(
            f"the KL to the unquantized model is {mean} ({wrong} of {len(kl_N)} tokens); expected a finite number"
        )
    # `numpy.percentile` since `torch.quantile` refuses more than 16 million values.
    return Fidelity(mean, float(np.percentile(kl_N.cpu().numpy(), 99)), agreed / len(kl_N), len(kl_N))
