"""What a reader must know before trusting a verdict: each a sentence with its figures, none of them decides."""

from collections.abc import Iterator

from stages.formats.scores import CandidateScores
from stages.promote.checks import limits_quality
from stages.promote.evidence import Evidence
from stages.promote.gate import Gate

__all__ = ["FEW_DOCUMENTS", "warnings_of"]

FEW_DOCUMENTS = 30
"""Equally long documents below which a few of them decide: the usual rule of thumb for a mean's distribution."""


def warnings_of(evidence: Evidence, gate: Gate) -> tuple[str, ...]:
    """Return the warnings, the gravest first."""
    return (*_toys(evidence), *_weak_teacher(evidence), *_limits(evidence, gate), *_few_documents(evidence))


def _toys(evidence: Evidence) -> Iterator[str]:
    """Say which models lose to counting words: by the trigram, or by the bigram where it is only that."""
    scores = evidence.scores
    perplexities = {name: each.perplexity for name, each in scores.models.items()}
    perplexities = {"the teacher": evidence.perplexity(evidence.teacher), **perplexities}
    perplexities.pop(scores.reference or "", None)
    for what, reference in (("bigram", scores.bigram), ("trigram", scores.trigram)):
        if reference is None:
            continue
        losers = {name: value for name, value in perplexities.items() if value >= reference.perplexity}
        for name in losers:
            del perplexities[name]
        if losers:
            low, high = min(losers.values()), max(losers.values())
            theirs = f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
            yield (
                f"toys: a Kneser-Ney {what} of the same training tokens predicts this text better (perplexity "
                f"{reference.perplexity:.4g}) than {', '.join(losers)} ({theirs}); what is said of them holds for toys"
            )


def _weak_teacher(evidence: Evidence) -> Iterator[str]:
    teacher = evidence.perplexity(evidence.teacher)
    students = {
        name: scores.perplexity
        for name, scores in evidence.models.items()
        if name != evidence.teacher and not _is_derived(scores) and scores.perplexity <= teacher
    }
    if students:
        listed = ", ".join(f"{name} ({value:.4g})" for name, value in students.items())
        yield (
            f"teacher too weak: its perplexity of {teacher:.4g} is no better than that of {listed}, which cannot have "
            "learned from it what it does not know; train it longer, or take a better one"
        )


def _is_derived(scores: CandidateScores) -> bool:
    return scores.base_fingerprint is not None


def _limits(evidence: Evidence, gate: Gate) -> Iterator[str]:
    if gate.limits and not limits_quality(gate):
        yield (
            "the gate has no limit on quality: the smallest candidate is promoted, however bad; set one, e.g. "
            "max_kl_to_base or max_perplexity_ratio_to_teacher"
        )
    floor = evidence.scores.noise_floor
    if floor is None or floor.kl_to_reference is None:
        return
    for limit in ("max_kl_to_base", "max_kl_to_teacher"):
        bound = gate.limits.get(limit)
        if bound is not None and bound < floor.kl_to_reference:
            yield (
                f"{limit}={bound:g} is below the noise floor: the teacher run again in {evidence.scores.dtype} differs "
                f"from itself by {floor.kl_to_reference:.2g} nats/token; score in float32, or set it higher"
            )


def _few_documents(evidence: Evidence) -> Iterator[str]:
    resamples = evidence.resamples
    if resamples.effective < FEW_DOCUMENTS:
        yield (
            f"few documents: the {resamples.num_documents} that were scored are worth {resamples.effective:.1f} of "
            "equal "
            "length, so that intervals are wide and small differences stay unseen; score more documents, not longer "
            "ones"
        )
