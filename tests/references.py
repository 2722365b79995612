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


def kneser_ney(ngrams: list[tuple[int, int, int]], vocabulary_size: int, order: int) -> dict[tuple[int, ...], Array]:
    """Interpolated modified Kneser-Ney (Chen & Goodman 1998), each context's whole distribution, word by word.

    Returns the distribution `[V]` for every context that was seen at the highest order, and for `()` the unigrams'.
    """
    words = range(vocabulary_size)
    seen = [tuple(gram[3 - order :]) for gram in ngrams]
    counts: dict[tuple[int, ...], float] = {gram: seen.count(gram) for gram in set(seen)}
    levels = [counts]
    for _ in range(order - 1):
        shorter: dict[tuple[int, ...], float] = {}
        for gram in levels[-1]:
            shorter[gram[1:]] = shorter.get(gram[1:], 0) + 1
        levels.append(shorter)
    distribution: dict[tuple[int, ...], Array] = {}
    lower_of = {(): np.full(vocabulary_size, 1 / vocabulary_size)}
    for counts in reversed(levels):
        n = [sum(value == k for value in counts.values()) for k in (1, 2, 3, 4)]
        discounts = (0.5, 1.0, 1.5)
        if 0 not in n:
            y = n[0] / (n[0] + 2 * n[1])
            found = (1 - 2 * y * n[1] / n[0], 2 - 3 * y * n[2] / n[1], 3 - 4 * y * n[3] / n[2])
            discounts = found if all(0 <= d <= k for k, d in enumerate(found, 1)) else discounts
        distribution = {}
        for context in {gram[:-1] for gram in counts}:
            own = {gram[-1]: value for gram, value in counts.items() if gram[:-1] == context}
            taken = {word: discounts[min(int(value), 3) - 1] for word, value in own.items()}
            total, mass = sum(own.values()), sum(taken.values())
            lower = lower_of[context[1:] if context else ()]
            distribution[context] = np.array(
                [(own.get(word, 0) - taken.get(word, 0)) / total + mass / total * lower[word] for word in words]
            )
        lower_of = distribution
    return distribution
