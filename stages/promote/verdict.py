"""Decide: which candidate is the champion, which claim holds, and why, in sentences with figures.

The champion is the smallest candidate that keeps every limit (bytes on disk; of equal sizes the one closer to the
teacher). The teacher is the reference and never a champion. Does not: change a registry; tracking applies it.
"""

from collections.abc import Mapping, Sequence

from stages.errors import StageFailed, nearest
from stages.formats.report import Check, QualityClaim, Verdict
from stages.promote.checks import check_candidate
from stages.promote.evidence import FEW_DOCUMENTS, Evidence
from stages.promote.gate import Gate

__all__ = ["compare_models", "decide"]


def decide(
    evidence: Evidence, gate: Gate, *, registered_name: str, baseline: str | None, contender: str | None
) -> Verdict:
    """Apply the gate to every candidate but the teacher, choose the champion, and judge the claim.

    Raises:
        StageFailed: `baseline` or `contender` is no model that was scored.
    """
    scores = evidence.models
    checks = {name: check_candidate(gate, name, evidence) for name in scores if name != evidence.teacher}
    passing = [name for name, found in checks.items() if all(check.passed for check in found)]
    champion = min(passing, key=lambda n: (scores[n].size_bytes, scores[n].kl_to_reference, n), default=None)
    claims = []
    if baseline is not None and contender is not None:
        claims.append(compare_models(evidence, baseline=baseline, contender=contender))
    return Verdict(
        outcome="rejected" if champion is None else "accepted",
        champion=champion,
        registered_name=registered_name,
        reasons=tuple(_reasons(evidence, checks, champion)),
        claims=tuple(claims),
        checks=checks,
    )


def compare_models(evidence: Evidence, *, baseline: str, contender: str) -> QualityClaim:
    """Judge the claim that one model predicts held-out text better than another, beyond noise.

    Returns:
        the difference of cross-entropies (baseline − contender, nats per token), its 95 % interval over documents, and
        whether the interval lies above zero.
    """
    for field, name in (("baseline", baseline), ("contender", contender)):
        if name not in evidence.models:
            raise StageFailed(
                f"{field}={name!r} is no model that was scored{nearest(name, list(evidence.models))}; set it to one"
            )
    found = evidence.bootstrap.interval(
        lambda sums: (sums[f"{baseline}/nll"] - sums[f"{contender}/nll"]) / sums["tokens"]
    )
    perplexities = {name: evidence.perplexity(name) for name in (baseline, contender)}
    holds = found.low > 0
    outcome = "beats" if holds else "is worse than" if found.high < 0 else "does not beat, beyond noise,"
    text = (
        f"{contender} {outcome} {baseline} on held-out text: perplexity {perplexities[baseline]:.4g} → "
        f"{perplexities[contender]:.4g}, a gain of {found.estimate:+.4f} nats per token (95% interval {found.low:+.4f} "
        f"to {found.high:+.4f} over {evidence.num_documents} documents)"
    )
    return QualityClaim(
        claim=f"{contender} beats {baseline} on held-out text",
        difference_nats_per_token=found.estimate,
        interval=(found.low, found.high),
        perplexities=perplexities,
        holds=holds,
        text=text,
    )


def _reasons(evidence: Evidence, checks: Mapping[str, Sequence[Check]], champion: str | None) -> list[str]:
    reasons = []
    if champion is not None:
        reasons.append(_promotion(evidence, champion))
    elif not checks:
        reasons.append("nothing to promote: no model but the teacher was scored")
    else:
        reasons.append(f"nothing promoted: none of {len(checks)} candidates keeps every limit")
    for name, found in checks.items():
        failed = [check.text for check in found if not check.passed]
        if failed:
            reasons.append(f"{name} is out: {'; '.join(failed)}")
    if evidence.num_documents < FEW_DOCUMENTS:
        reasons.append(f"the intervals are rough: they rest on {evidence.num_documents} documents only")
    return reasons


def _promotion(evidence: Evidence, champion: str) -> str:
    """Say what the champion gains and what it loses."""
    scores = evidence.models[champion]
    teacher = evidence.perplexity(evidence.teacher)
    change = scores.perplexity / teacher - 1
    text = (
        f"promoted {champion}: {scores.compression_x:.1f}x smaller than the teacher "
        f"({scores.size_bytes / 1e6:.3g} MB vs {evidence.scores.reference_bytes / 1e6:.3g} MB) at "
        f"{scores.kl_to_reference:.3g} nats/token KL to it, perplexity {teacher:.4g} → {scores.perplexity:.4g} "
        f"({change:+.1%}), the same top-1 token for {scores.agreement:.1%} of tokens"
    )
    if scores.base is not None:
        increase = scores.perplexity / evidence.perplexity(scores.base) - 1
        base = "the teacher" if scores.base == evidence.teacher else scores.base
        text += f"; of that, deriving it from {base} ({scores.kind}) moved it by {scores.kl_to_base:.3g} "
        text += f"nats/token KL and changed perplexity by {increase:+.1%}"
    return text
