"""Cross-entropy and the divergences between teacher and student, each written once.

Promise: every term is computed in float32 whatever the logits' dtype; a batch's loss is a sum over unmasked targets,
which the caller divides by a count over the whole batch, never a mean of means; float32 copies of the logits are
bounded by `chunk_tokens` rows, since each chunk's gradient is taken where the chunk is and only that is kept.

The divergence to stored top-k signals treats all the other entries as one bucket, whose mass is matched and never
renormalized away (renormalized top-k teaches over-confidence: https://arxiv.org/abs/2503.16870):

    KL = Σ_K p_i (log p_i − log q_i) + p_tail (log p_tail − log q_tail),      q_tail = 1 − Σ_K q_i

`log q_tail` is a log-sum-exp over the entries outside of K, so that neither it nor its gradient cancels.

Shapes: N tokens, M unmasked tokens, V vocabulary, K kept entries.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from stages.ops.targets import SparseTarget

CHUNK_TOKENS = 256
"""Rows of logits in float32 at once: 256 × 4,096 × 4 B = 4 MiB stays near the cache (measured on two CPU cores)."""

Term = Callable[[Tensor, slice], tuple[Tensor, ...]]
"""(logits of a chunk [n, V] float32, which of the M targets it holds) → the terms' sums, the weighted loss first."""


def cross_entropy(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Return −log softmax(logits)[target] for each token, [N] float32, in nats."""
    return functional.cross_entropy(logits_NV.float(), targets_N, reduction="none")


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p ‖ q) over the last dimension in nats, for normalized log-probabilities of one shape [..., V].

    An entry where p is zero (log −inf) adds nothing.
    """
    log_p, log_q = log_p.float(), log_q.float()
    difference = torch.where(log_p == float("-inf"), torch.zeros_like(log_p), log_p - log_q)
    return (log_p.exp() * difference).sum(-1)


def sparse_kl_divergence(logits_NV: Tensor, target: SparseTarget, temperature: float) -> Tensor:
    """Return KL(p ‖ softmax(logits / temperature)) with the entries outside of the top k as one bucket.

    Args:
        logits_NV: the student's logits.
        target: the teacher's distribution at the same temperature.
        temperature: divides the logits. The result is not multiplied by its square.

    Returns:
        [N] float32, in nats; differentiable with regard to the logits.
    """
    scaled_NV = logits_NV.float() / temperature if temperature != 1 else logits_NV.float()
    kept_NK = scaled_NV.gather(1, target.ids_NK)
    log_sum_kept_N = kept_NK.logsumexp(1)
    p_NK = target.probs_NK
    if p_NK.shape[1] == scaled_NV.shape[1]:  # nothing lies outside: there is no bucket
        return (torch.xlogy(p_NK, p_NK) - p_NK * (kept_NK - log_sum_kept_N[:, None])).sum(1)
    log_sum_tail_N = scaled_NV.scatter(1, target.ids_NK, float("-inf")).logsumexp(1)
    log_sum_N = torch.logaddexp(log_sum_kept_N, log_sum_tail_N)
    kept_N = (torch.xlogy(p_NK, p_NK) - p_NK * (kept_NK - log_sum_N[:, None])).sum(1)
    return kept_N + torch.xlogy(target.tail_N, target.tail_N) - target.tail_N * (log_sum_tail_N - log_sum_N)


class _ChunkedSum(torch.autograd.Function):
    """Sums terms over chunks of rows, taking each chunk's gradient at once; keeps one gradient in the logits' dtype."""

    @staticmethod
    def forward(
        ctx: Any, logits_NV: Tensor, positions_M: Tensor, term: Term, chunk_tokens: int
    ) -> tuple[Tensor, Tensor]:
        wanted = logits_NV.requires_grad
        gradient_NV = torch.zeros_like(logits_NV) if wanted else None
        sums: Tensor | None = None
        for start in range(0, len(positions_M), chunk_tokens):
            index = positions_M[start : start + chunk_tokens]
            with torch.set_grad_enabled(wanted):
                chunk = logits_NV.detach().index_select(0, index).float().requires_grad_(wanted)
                terms = term(chunk, slice(start, start + len(index)))
            if gradient_NV is not None:
                (gradient,) = torch.autograd.grad(terms[0], chunk)
                gradient_NV.index_copy_(0, index, gradient.to(gradient_NV.dtype))
            added = torch.stack([value.detach() for value in terms])
            sums = added if sums is None else sums + added
        if sums is None:
            sums = torch.zeros(1, device=logits_NV.device)
        ctx.gradient_NV = gradient_NV
        ctx.mark_non_differentiable(sums)
        return sums[0].clone(), sums

    @staticmethod
    def backward(ctx: Any, scale: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        gradient_NV, ctx.gradient_NV = ctx.gradient_NV, None
        return gradient_NV.mul_(scale), None, None, None


def chunked_sum(
    logits_NV: Tensor, positions_M: Tensor, term: Term, *, chunk_tokens: int = CHUNK_TOKENS
) -> tuple[Tensor, Tensor]:
    """Sum a loss over the unmasked tokens without a second [N, V] tensor in float32.

    Args:
        logits_NV: logits of every token, in any floating dtype.
        positions_M: int64 rows of the tokens whose prediction counts, on the same device.
        term: the loss of a chunk; sees its logits in float32. Must not depend on how the rows are cut.
        chunk_tokens: rows in a chunk.

    Returns:
        the weighted sum (differentiable once, by one backward pass) and all the term's sums (not differentiable).
    """
    loss, sums = _ChunkedSum.apply(logits_NV, positions_M, term, chunk_tokens)  # type: ignore[no-untyped-call]
    return loss, sums
