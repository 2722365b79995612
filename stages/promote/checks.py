"""Apply a gate's limits to candidates.

A limit on quality is a claim of non-inferiority: the unfavorable end of its 95 % interval over documents must keep the
limit, so that too little text means "not shown", never "fine". As many candidates are tried as there are, Holm's
correction holds the chance that any of them keeps its limits by luck at 2.5 % (within a candidate all limits must hold,
which needs none). Sizes are exact and speeds are percentiles of many runs; these are compared as they are.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from stages.errors import StageFailed
from stages.formats.report import Check
from stages.formats.scores import CandidateScores
from stages.formats.speed import CandidateSpeed
from stages.ops.statistics import ALPHA, Resamples, Statistic, holm
from stages.promote.evidence import Evidence
from stages.promote.gate import Gate
from stages.promote.serving_check import check_runtime

__all__ = ["check_candidates", "keeps_exact_limits", "limits_quality"]


@dataclass(frozen=True, slots=True)
class QualityRule:
    """How a limit on quality is computed."""

    what: str
    unit: str
    against_base: bool
    statistic: Callable[[str, str], Statistic]
    """(candidate, base or teacher) → the figure, of sums over documents."""


@dataclass(frozen=True, slots=True)
class ExactRule:
    """How a limit on a figure without noise is found."""

    what: str
    unit: str
    figure: Callable[[CandidateScores, CandidateSpeed], float | None]


def _mean(column: str) -> Callable[[str, str], Statistic]:
    return lambda name, other: lambda sums: sums[f"{name}/{column}"] / sums["tokens"]


def _perplexity_ratio(minus: float) -> Callable[[str, str], Statistic]:
    return lambda name, other: lambda s: np.exp((s[f"{name}/nll"] - s[f"{other}/nll"]) / s["tokens"]) - minus


_QUALITY: Mapping[str, QualityRule] = {
    "max_kl_to_base": QualityRule("KL to its base", " nats/token", True, _mean("kl_to_base")),
    "min_agreement_with_base": QualityRule("agreement with its base", "", True, _mean("agree_with_base")),
    "max_perplexity_increase_fraction": QualityRule(
        "perplexity increase over its base", "", True, _perplexity_ratio(1.0)
    ),
    "max_kl_to_teacher": QualityRule("KL to the teacher", " nats/token", False, _mean("kl")),
    "min_agreement_with_teacher": QualityRule("agreement with the teacher", "", False, _mean("agree")),
    "max_perplexity_ratio_to_teacher": QualityRule("perplexity over the teacher's", "x", False, _perplexity_ratio(0.0)),
}
_EXACT: Mapping[str, ExactRule] = {
    "min_compression_x": ExactRule(
        "compression against the teacher in 16 bits", "x", lambda scores, _: scores.compression_x
    ),
    "max_size_bytes": ExactRule("size", " bytes", lambda scores, _: scores.size_bytes),
    "max_latency_p50_ms": ExactRule("median latency", " ms/token", lambda _, speed: speed.latency_p50_ms),
    "max_peak_memory_bytes": ExactRule("peak memory", " bytes", lambda _, speed: speed.peak_memory_bytes),
}


def limits_quality(gate: Gate) -> bool:
    """Return whether any limit is on quality."""
    return any(limit in _QUALITY for limit in gate.limits)


def keeps_exact_limits(checks: Sequence[Check]) -> bool:
    """Return whether a candidate keeps the limits of size and speed, whatever its quality."""
    return all(check.passed for check in checks if check.limit not in _QUALITY)


def check_candidates(gate: Gate, names: Sequence[str], evidence: Evidence) -> dict[str, tuple[Check, ...]]:
    """Apply every limit of the gate to every candidate, and correct for their number.

    Those that keep the limits of size and speed count: of the others nothing is claimed.
    """
    checks = {name: _check_candidate(gate, name, evidence) for name in names}
    worst = {
        name: max(check.p_value for check in found if check.p_value is not None)
        for name, found in checks.items()
        if keeps_exact_limits(found) and any(check.p_value is not None for check in found)
    }
    for name, adjusted in zip(worst, holm(list(worst.values())), strict=True):
        checks[name] = tuple(_corrected(check, adjusted / worst[name], len(worst)) for check in checks[name])
    return checks


def _corrected(check: Check, factor: float, num_candidates: int) -> Check:
    """Return a check as it stands beside those of other candidates."""
    if not check.passed or check.p_value is None or factor * check.p_value <= ALPHA:
        return check
    text = f"{check.text}, but that is not shown for {num_candidates} candidates at once (Holm: p = "
    text += f"{factor * check.p_value:.3f}, at most {ALPHA} is needed)"
    return check.model_copy(update={"passed": False, "text": text})


def _check_candidate(gate: Gate, name: str, evidence: Evidence) -> tuple[Check, ...]:
    """Apply every limit that holds for a candidate: those to the base for whatever was derived from one."""
    scores, speed = evidence.models[name], evidence.speed(name)
    checks = []
    for limit, bound in gate.limits.items():
        if limit in _EXACT:
            rule = _EXACT[limit]
            checks.append(_check_exact(limit, bound, rule, rule.figure(scores, speed), speed.reason))
        elif not _QUALITY[limit].against_base:
            checks.append(_check_quality(limit, bound, evidence.resamples, name, evidence.teacher))
        elif scores.base is not None:
            checks.append(_check_quality(limit, bound, evidence.resamples, name, scores.base))
        elif scores.base_fingerprint is not None:
            text = (
                f"{_QUALITY[limit].what} is not known: the model that it was derived from "
                f"({scores.base_fingerprint[:12]}) is not among the models that were scored"
            )
            checks.append(Check(limit=limit, bound=bound, value=None, interval=None, passed=False, text=text))
    if limits_quality(gate) and not _is_bound(gate, name, evidence):
        text = (
            "its distance to the teacher has no limit: the gate limits that to the base only, and it was not derived "
            "from the teacher; set one, e.g. max_perplexity_ratio_to_teacher or max_kl_to_teacher"
        )
        checks.append(Check(limit="quality", bound=0.0, value=None, interval=None, passed=False, text=text))
    if gate.runtime is not None:
        checks.append(check_runtime(gate.runtime, scores, speed))
    return tuple(checks)


def _is_bound(gate: Gate, name: str, evidence: Evidence) -> bool:
    """Return whether some limit holds a candidate's distance to the teacher, perhaps by way of its bases."""
    if any(limit in _QUALITY and not _QUALITY[limit].against_base for limit in gate.limits):
        return True
    seen: list[str] = []
    while name != evidence.teacher and name in evidence.models and name not in seen:
        seen.append(name)
        name = evidence.models[name].base or ""
    return name == evidence.teacher


def _check_quality(limit: str, bound: float, resamples: Resamples, name: str, other: str) -> Check:
    rule = _QUALITY[limit]
    try:
        estimate = resamples.estimate(rule.statistic(name, other))
    except ValueError as error:
        raise StageFailed(f"{rule.what} of {name!r} has no interval: {error}; its figures are broken") from error
    at_most = limit.startswith("max")
    found, p = estimate.interval(), estimate.p_above(bound) if at_most else estimate.p_below(bound)
    excess = found.high - bound if at_most else bound - found.low
    unit = rule.unit
    shown = f"{rule.what} {found.estimate:.4g}{unit} (95% interval {found.low:.4g} to {found.high:.4g}{unit})"
    if excess > 0:
        end, side = ("upper", "above") if at_most else ("lower", "below")
        text = f"{shown}, its {end} end is {excess:.3g}{unit} {side} the limit of {bound:g}{unit}"
    else:
        text = f"{shown}, within the limit of {'at most' if at_most else 'at least'} {bound:g}{unit}"
        if p > ALPHA:
            text += f", which {resamples.num_documents} documents cannot show (p = {p:.3f})"
    interval, passed = (found.low, found.high), excess <= 0 and p <= ALPHA
    return Check(limit=limit, bound=bound, value=found.estimate, interval=interval, p_value=p, passed=passed, text=text)


def _check_exact(limit: str, bound: float, rule: ExactRule, value: float | None, reason: str | None) -> Check:
    what, unit = rule.what, rule.unit
    if value is None:
        why = f" ({reason})" if reason else ""
        text = f"{what} is not measured{why}, so the limit of {bound:g}{unit} is not shown to be kept"
        return Check(limit=limit, bound=bound, value=None, interval=None, passed=False, text=text)
    assert math.isfinite(value), f"{what} is {value}"
    at_most = limit.startswith("max")
    passed = value <= bound if at_most else value >= bound
    if passed:
        text = f"{what} {value:.4g}{unit}, within the limit of {'at most' if at_most else 'at least'} {bound:g}{unit}"
    else:
        side = "above" if at_most else "below"
        text = f"{what} {value:.4g}{unit}, {abs(value - bound):.3g}{unit} {side} the limit of {bound:g}{unit}"
    return Check(limit=limit, bound=bound, value=value, interval=None, passed=passed, text=text)
