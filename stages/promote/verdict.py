"""Decide: which candidate is the champion, which claim holds, and why, in sentences with figures.

The champion is the smallest candidate that keeps every limit (bytes on disk; of equal sizes the one closer to the
teacher) and that no other one beats in both size and KL. The teacher is the reference and never a champion. Without a
limit nothing is judged. Does not: change a registry; tracking applies it, and defends the champion that reigns there.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from stages.formats.report import Check, Verdict
from stages.promote.cautions import warnings_of
from stages.promote.checks import check_candidates, keeps_exact_limits
from stages.promote.claims import judge_claim
from stages.promote.evidence import Evidence
from stages.promote.gate import Gate
from stages.promote.method import Method

__all__ = ["decide"]


def decide(
    evidence: Evidence, gate: Gate, *, registered_name: str, baseline: Method | None, contender: Method | None
) -> Verdict:
    """Apply the gate to every candidate but the teacher, choose the champion, and judge the claim.

    Raises:
        StageFailed: a model of `baseline` or `contender` was not scored.
    """
    scores = evidence.models
    checks = check_candidates(gate, [name for name in scores if name != evidence.teacher], evidence)
    beaten_by = _find_beaten(evidence, checks)
    passing = [name for name, found in checks.items() if all(check.passed for check in found) and name not in beaten_by]
    champion, outcome = None, _outcome(gate, passing)
    if outcome == "accepted":
        champion = min(passing, key=lambda n: (scores[n].size_bytes, scores[n].kl_to_reference, n))
    claims = []
    if baseline is not None and contender is not None:
        claims.append(judge_claim(evidence, baseline=baseline, contender=contender))
    return Verdict(
        outcome=outcome,
        champion=champion,
        registered_name=registered_name,
        reasons=tuple(_reasons(evidence, checks, beaten_by, outcome, champion)),
        claims=tuple(claims),
        checks=checks,
        beaten_by=beaten_by,
        warnings=warnings_of(evidence, gate),
    )


def _outcome(gate: Gate, passing: Sequence[str]) -> Literal["accepted", "rejected", "unjudged"]:
    if not gate.limits:
        return "unjudged"
    return "accepted" if passing else "rejected"


def _find_beaten(evidence: Evidence, checks: Mapping[str, Sequence[Check]]) -> dict[str, str]:
    """Return of each candidate that another one beats in both size and KL by which: the closest to the teacher.

    The other may be the teacher itself; a candidate that is too large or too slow for the gate is no alternative.
    """
    points = {name: (each.size_bytes, each.kl_to_reference) for name, each in evidence.models.items()}
    shippable = [name for name in points if name not in checks or keeps_exact_limits(checks[name])]
    found = {}
    for name in checks:
        better = [other for other in shippable if all(x < y for x, y in zip(points[other], points[name], strict=True))]
        if better:
            found[name] = min(better, key=lambda other: points[other][1])
    return found


def _reasons(
    evidence: Evidence,
    checks: Mapping[str, Sequence[Check]],
    beaten_by: Mapping[str, str],
    outcome: str,
    champion: str | None,
) -> list[str]:
    if not checks:
        return ["nothing to promote: no model but the teacher was scored"]
    reasons = []
    if champion is not None:
        reasons.append(_promotion(evidence, champion))
    elif outcome == "unjudged":
        return [
            "unjudged: the gate has no limit, so that nothing is promoted. What may be lost depends on what the model "
            "is for: set limits that its use can bear, e.g. --gate.max-perplexity-ratio-to-teacher 1.05 "
            "--gate.min-compression-x 2"
        ]
    else:
        reasons.append(f"nothing promoted: none of {len(checks)} candidates keeps every limit")
    for name, found in checks.items():
        if failed := [check.text for check in found if not check.passed]:
            reasons.append(f"{name} is out: {'; '.join(failed)}")
    return [*reasons, *_beaten(evidence, beaten_by)]


def _beaten(evidence: Evidence, beaten_by: Mapping[str, str]) -> Iterator[str]:
    """Say in a sentence for each candidate that beats others which ones it does."""
    for other in dict.fromkeys(beaten_by.values()):
        names = [name for name, by in beaten_by.items() if by == other]
        size, kl = evidence.models[other].size_bytes, evidence.models[other].kl_to_reference
        subject = f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} out"
        yield (
            f"{subject}: {other} is both smaller ({size:,} bytes) and closer to the teacher (KL {kl:.3g} nats/token)"
        )


def _promotion(evidence: Evidence, champion: str) -> str:
    """Say what the champion gains and what it loses."""
    scores, size16 = evidence.models[champion], evidence.scores.reference_bytes_16bit
    teacher = evidence.perplexity(evidence.teacher)
    change = scores.perplexity / teacher - 1
    text = (
        f"promoted {champion}: {scores.compression_x:.1f}x smaller than the teacher in 16 bits "
        f"({scores.size_bytes / 1e6:.3g} MB vs {size16 / 1e6:.3g} MB), {scores.bits_per_weight:.1f} bits a weight, at "
        f"{scores.kl_to_reference:.3g} nats/token KL to it, perplexity {teacher:.4g} → {scores.perplexity:.4g} "
        f"({change:+.1%}), the same top-1 token for {scores.agreement:.1%} of tokens"
    )
    if scores.base is not None:
        increase = scores.perplexity / evidence.perplexity(scores.base) - 1
        base = "the teacher" if scores.base == evidence.teacher else scores.base
        text += f"; of that, deriving it from {base} ({scores.kind}) moved it by {scores.kl_to_base:.3g} "
        text += f"nats/token KL and changed perplexity by {increase:+.1%}"
    return text
