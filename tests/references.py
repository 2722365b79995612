"""Float64 references, written as the formula stands and never fast: what `stages.ops` is tested against.

Nothing here calls `stages.ops`. Shapes: N tokens, V vocabulary, K kept entries.
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def log_softmax(logits: Array) -> Array:
    """log softmax over the last axis."""
    logits = logits.astype(np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def cross_entropy(logits_NV: Array, targets_N: NDArray[np.int64]) -> tuple[Array, Array]:
    """−log softmax(z)[target] per token, and its gradient softmax(z) − onehot."""
    log_q = log_softmax(logits_NV)
    rows = np.arange(len(targets_N))
    gradient = np.exp(log_q)
    gradient[rows, targets_N] -= 1
    return -log_q[rows, targets_N], gradient


def dense_kl(teacher_NV: Array, student_NV: Array, temperature: float) -> tuple[Array, Array]:
    """KL(softmax(t/τ) ‖ softmax(s/τ)) per token, and its gradient (q − p) / τ with regard to s."""
    log_p, log_q = log_softmax(teacher_NV / temperature), log_softmax(student_NV / temperature)
    p, q = np.exp(log_p), np.exp(log_q)
    return (p * (log_p - log_q)).sum(-1), (q - p) / temperature


def reverse_kl(teacher_NV: Array, student_NV: Array, temperature: float) -> tuple[Array, Array]:
    """Σ q (log q − log p) per token, log p at least −30, and its gradient q (log q − log p − KL) / τ with regard to s."""
    log_p = np.maximum(log_softmax(teacher_NV / temperature), -30.0)
    log_q = log_softmax(student_NV / temperature)
    kl = (np.exp(log_q) * (log_q - log_p)).sum(-1)
    return kl, np.exp(log_q) * (log_q - log_p - kl[..., None]) / temperature


def sparse_kl(
    teacher_NV: Array, student_NV: Array, ids_NK: NDArray[np.int64], temperature: float
) -> tuple[Array, Array]:
    """KL between the two distributions after all entries outside of `ids` are merged into one, and its gradient.

    With u = s/τ: ∂/∂u_j = q_j − p_j for kept entries and q_j − p_tail · q_j / q_tail for the others.
    """
    log_p, log_q = log_softmax(teacher_NV / temperature), log_softmax(student_NV / temperature)
    outside = np.ones(log_p.shape, bool)
    np.put_along_axis(outside, ids_NK, False, axis=1)
    p, q = np.exp(log_p), np.exp(log_q)
    p_tail, q_tail = (p * outside).sum(1), (q * outside).sum(1)
    kl = (np.where(outside, 0, p * (log_p - log_q))).sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        kl = kl + np.where(p_tail > 0, p_tail * (np.log(p_tail) - np.log(q_tail)), 0)
        shared = np.where(q_tail[:, None] > 0, p_tail[:, None] * q / q_tail[:, None], 0)
    return kl, (q - np.where(outside, shared, p)) / temperature


def log_partition(logits_NV: Array, temperature: float) -> Array:
    """c_τ = log Σ_j exp(l_j / τ) with l the log-probabilities at temperature 1."""
    return np.log(np.exp(log_softmax(logits_NV) / temperature).sum(-1))


def tail_log_mass(logits_NV: Array, ids_NK: NDArray[np.int64]) -> Array:
    """Log of the probability outside of `ids`, summed over just those entries."""
    probs = np.exp(log_softmax(logits_NV))
    np.put_along_axis(probs, ids_NK, 0.0, axis=1)
    with np.errstate(divide="ignore"):
        return np.log(probs.sum(-1))
