"""Logits → top-k signals: the k largest log-probabilities, the tail's mass, and one log-partition a temperature.

Promise: log-probabilities and the tail are normalized over the full vocabulary in float32 (never over the top k); the
tail is a sum over just the entries outside of the top k, so that a tail of 1e-12 is as exact as one of 0.1; the
log-partitions make every temperature that was asked for exact afterwards.

Speed: one pass of `exp` serves all temperatures that are two or four times one another (exp(x/2) = exp(x/4)²), all
in buffers that are kept between chunks (fresh ones cost more in page faults than the sums in them), and top-k looks at
block maxima first, since the k largest entries lie in the blocks of the k largest maxima (two CPU cores, V = 32,000,
k = 32: 18 instead of 50 µs a token). Hand it chunks of rows that stay in cache: `chunk_rows` says how many.

Shapes: N tokens, V vocabulary, K kept entries, C temperatures.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 64
"""Entries whose maximum stands for them (measured: 64 is within 10 % of the best for V from 4 k to 128 k)."""
CHUNK_BYTES = {"cpu": 2 * 1024**2, "cuda": 256 * 1024**2}
"""Float32 logits in one chunk: a core's L2 cache on a CPU; on a GPU enough that kernel launches do not count."""


@dataclass(frozen=True, slots=True)
class Signals:
    """What is kept of the teacher's distribution at each of N tokens."""

    ids_NK: Tensor
    """int32, by descending probability."""
    log_probs_NK: Tensor
    """float16, natural logarithm, temperature 1, normalized over the full vocabulary."""
    tail_log_mass_N: Tensor
    """float32: log of the mass outside of the kept entries at temperature 1; −inf where nothing is left."""
    log_partitions_NC: Tensor
    """float32: c_tau for each temperature."""
    finite_N: Tensor
    """bool: no logit was NaN or +inf. Where it is false the other values mean nothing."""


def chunk_rows(vocabulary: int, device_type: str) -> int:
    """Return the rows of float32 logits to hand to `capture` at once."""
    return max(8, CHUNK_BYTES[device_type] // (4 * vocabulary))


def top_k(values_NV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest values of each row in descending order, and their int64 columns; exact."""
    vocabulary = values_NV.shape[1]
    whole = vocabulary // BLOCK * BLOCK
    num_blocks = whole // BLOCK
    if num_blocks <= 2 * k:  # the candidates would be no fewer than the row
        return tuple(values_NV.topk(k, dim=1))  # type: ignore[return-value]
    maxima_NB = values_NV[:, :whole].view(-1, num_blocks, BLOCK).amax(2)
    block_NK = maxima_NB.topk(k, dim=1, sorted=False).indices
    columns_NX = (block_NK[:, :, None] * BLOCK + torch.arange(BLOCK, device=values_NV.device)).flatten(1)
    if whole < vocabulary:
        rest = torch.arange(whole, vocabulary, device=values_NV.device).expand(len(values_NV), -1)
        columns_NX = torch.cat([columns_NX, rest], 1)
    found = values_NV.gather(1, columns_NX).topk(k, dim=1)
    return found.values, columns_NX.gather(1, found.indices)


def _squarings(ratio: float) -> int | None:
    """Return n where ratio = 2ⁿ and squaring n times keeps float32 exact to a few ulp, else None."""
    return {2.0: 1, 4.0: 2}.get(ratio)


def _log_sums(
    shifted_NV: Tensor, weights_NV: Tensor, columns_NK: Tensor, temperatures: tuple[float, ...]
) -> tuple[dict[float, Tensor], Tensor]:
    """Return log Σ exp(x / tau) for each temperature and for 1, and log Σ exp(x) outside of `columns`.

    From the highest temperature down, each set of weights is the square of the one before where that is exact.
    `weights_NV` is overwritten.
    """
    sums: dict[float, Tensor] = {}
    tail_N, before = shifted_NV.new_empty(0), math.inf
    for tau in sorted({*temperatures, 1.0}, reverse=True):
        squarings = _squarings(before / tau)
        if squarings is None:
            torch.mul(shifted_NV, 1 / tau, out=weights_NV)
            weights_NV.exp_()
        for _ in range(squarings or 0):
            weights_NV.square_()
        sums[tau], before = weights_NV.sum(1).log(), tau
        if tau == 1:
            tail_N, before = weights_NV.scatter_(1, columns_NK, 0.0).sum(1).log(), math.inf
    return sums, tail_N


def capture(logits_NV: Tensor, k: int, temperatures: tuple[float, ...], *, work: Tensor | None = None) -> Signals:
    """Reduce a chunk of logits to signals.

    Args:
        logits_NV: the teacher's logits over exactly the dataset's vocabulary, any floating dtype; not changed.
        k: entries to keep, 1 ≤ k ≤ V.
        temperatures: those whose log-partition is wanted.
        work: float32 [2, ≥ N, V] to compute in, kept between calls for speed; new where None.

    Returns:
        signals on the logits' device.
    """
    if work is None:
        work = torch.empty(2, *logits_NV.shape, dtype=torch.float32, device=logits_NV.device)
    shifted_NV, weights_NV = work[0, : len(logits_NV)], work[1, : len(logits_NV)]
    shifted_NV.copy_(logits_NV)
    values_NK, columns_NK = top_k(shifted_NV, k)
    largest_N1 = values_NK[:, :1]
    shifted_NV.sub_(largest_N1)
    sums, tail_N = _log_sums(shifted_NV, weights_NV, columns_NK, temperatures)
    log_sum_N = sums[1.0]
    return Signals(
        ids_NK=columns_NK.int(),
        log_probs_NK=(values_NK - largest_N1 - log_sum_N[:, None]).half(),
        tail_log_mass_N=tail_N - log_sum_N,
        log_partitions_NC=torch.stack([sums[tau] - log_sum_N / tau for tau in temperatures], 1),
        finite_N=torch.isfinite(log_sum_N + largest_N1[:, 0]),
    )


def join(parts: list[Signals]) -> Signals:
    """Return the signals of consecutive chunks as one."""
    return Signals(
        ids_NK=torch.cat([part.ids_NK for part in parts]),
        log_probs_NK=torch.cat([part.log_probs_NK for part in parts]),
        tail_log_mass_N=torch.cat([part.tail_log_mass_N for part in parts]),
        log_partitions_NC=torch.cat([part.log_partitions_NC for part in parts]),
        finite_N=torch.cat([part.finite_N for part in parts]),
    )
