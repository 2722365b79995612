"""Stored top-k signals → the teacher's distribution at a temperature, exactly.

From log-probabilities l at temperature 1 and c_tau = log Σ_j exp(l_j / tau) over the whole vocabulary,
p_i^(tau) = exp(l_i / tau − c_tau); without c_tau no temperature but 1 could be had from a sparse target. What the
kept entries leave to 1 is the mass of all the others.

The log-probabilities are stored in float16, which errs by up to 2⁻¹¹ of their size. Their sum is known better than
that, from the tail's float32 mass: a common shift for each token makes them agree with it before they are used.

Shapes: N tokens, K kept entries.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class SparseTarget:
    """A distribution over a vocabulary, known in K entries and in the mass of all the others together."""

    ids_NK: Tensor
    """int64; distinct in each row."""
    probs_NK: Tensor
    """float32."""
    tail_N: Tensor
    """float32, ≥ 0: 1 − Σ_K probs."""


def sparse_target(
    ids_NK: Tensor, log_probs_NK: Tensor, *, tail_log_mass_N: Tensor, log_partition_N: Tensor, temperature: float
) -> SparseTarget:
    """Return the teacher's distribution at a temperature.

    Args:
        ids_NK: entries kept, int64.
        log_probs_NK: their natural log-probabilities at temperature 1, any floating dtype.
        tail_log_mass_N: log of the mass outside of them at temperature 1; −inf where there is none.
        log_partition_N: c_tau for this temperature.
        temperature: tau > 0.
    """
    stored_NK = log_probs_NK.float()
    shift_N = torch.log1p(-tail_log_mass_N.float().exp().clamp(max=1 - 1e-6)) - stored_NK.logsumexp(1)
    probs_NK = torch.exp((stored_NK + shift_N[:, None]) / temperature - log_partition_N.float()[:, None])
    mass_N = probs_NK.sum(1)
    probs_NK = probs_NK / mass_N.clamp(min=1)[:, None]  # rounding alone can take the sum above 1
    return SparseTarget(ids_NK, probs_NK, (1 - mass_N).clamp(min=0))
