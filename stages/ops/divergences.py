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

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from stages.ops.targets import SparseTarget

CHUNK_TOKENS = 256
"""Rows of logits in float32 at once: 256 × 4,096 × 4 B = 4 MiB stays near the cache (measured on two CPU cores)."""

MIN_TEACHER_LOG_PROB = -30.0
"""Floor of a teacher's log-probabilities in reverse KL, which is infinite where the teacher's is zero and the student's
is not. e^−30 is 1e-13: over 262,144 entries all that the floor adds to the teacher's mass is 2.5e-8."""

Term = Callable[[tuple[Tensor, ...], slice], tuple[Tensor, ...]]
"""(each value's rows of a chunk, float32; which of the M targets they are) → the sums, the weighted loss first."""


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


def reverse_kl_divergence(logits_NV: Tensor, teacher_logits_NV: Tensor, temperature: float) -> Tensor:
    """Return KL(student ‖ teacher) of both softened by a temperature, which divides the logits.

    The teacher's log-probabilities are raised to `MIN_TEACHER_LOG_PROB` and not normalized again, so that an entry that
    the teacher rules out (a logit of −inf) costs 30 nats times the student's probability, not infinitely much.

    Args:
        logits_NV: the student's logits.
        teacher_logits_NV: the teacher's, over the same vocabulary.
        temperature: divides both. The result is not multiplied by its square.

    Returns:
        [N] float32, in nats; differentiable with regard to the student's logits.
    """
    log_q_NV = (logits_NV.float() / temperature).log_softmax(-1)
    log_p_NV = (teacher_logits_NV.float() / temperature).log_softmax(-1).clamp(min=MIN_TEACHER_LOG_PROB)
    return kl_divergence(log_q_NV, log_p_NV)


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
    """Sums terms over chunks of rows, taking each chunk's gradient at once; keeps one gradient for each value."""

    @staticmethod
    def forward(ctx: Any, positions_M: Tensor, term: Term, chunk_tokens: int, *values: Tensor) -> tuple[Tensor, Tensor]:
        wanted = [value.requires_grad for value in values]
        gradients = [torch.zeros_like(value) if value.requires_grad else None for value in values]
        sums: Tensor | None = None
        for start in range(0, len(positions_M), chunk_tokens):
            index = positions_M[start : start + chunk_tokens]
            with torch.set_grad_enabled(any(wanted)):
                chunks = tuple(
                    value.detach().index_select(0, index).float().requires_grad_(value.requires_grad)
                    for value in values
                )
                terms = term(chunks, slice(start, start + len(index)))
            learned = [(whole, chunk) for whole, chunk in zip(gradients, chunks, strict=True) if whole is not None]
            if learned:
                found = torch.autograd.grad(terms[0], [chunk for _, chunk in learned], allow_unused=True)
                for (whole, _), gradient in zip(learned, found, strict=True):
                    if gradient is not None:
                        whole.index_copy_(0, index, gradient.to(whole.dtype))
            added = torch.stack([value.detach() for value in terms])
            sums = added if sums is None else sums + added
        if sums is None:
            sums = torch.zeros(1, device=positions_M.device)
        ctx.gradients = gradients
        ctx.mark_non_differentiable(sums)
        return sums[0].clone(), sums

    @staticmethod
    def backward(ctx: Any, scale: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        return (None, None, None, *(None if gradient is None else gradient.mul_(scale) for gradient in gradients))


def chunked_sum(
    values: Sequence[Tensor], positions_M: Tensor, term: Term, *, chunk_tokens: int = CHUNK_TOKENS
) -> tuple[Tensor, Tensor]:
    """Sum a loss over the unmasked tokens without a second [N, V] tensor in float32.

    Args:
        values: what the loss is a function of, each [N, …] in any floating dtype: logits of every token, hidden states.
        positions_M: int64 rows of the tokens whose prediction counts, on the same device.
        term: the loss of a chunk; sees its rows of the values in float32. Must not depend on how the rows are cut.
        chunk_tokens: rows in a chunk.

    Returns:
        the weighted sum (differentiable once, by one backward pass) and all the term's sums (not differentiable).
    """
    loss, sums = _ChunkedSum.apply(positions_M, term, chunk_tokens, *values)  # type: ignore[no-untyped-call]
    return loss, sums
