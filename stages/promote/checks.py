"""Apply a gate's limits to a candidate.

A limit on quality is a claim of non-inferiority: the unfavorable end of its 95 % interval (paired bootstrap over
documents) must keep the limit, so that too little text means "not shown", never "fine". Sizes are exact and speeds are
percentiles of many runs; these are compared as they are. Does not: correct for the number of candidates.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from stages.errors import StageFailed
from stages.ops.statistics import PairedBootstrap, Statistic
from stages.promote.gate import Gate

__all__ = ["Check", "check_candidate"]


@dataclass(frozen=True, slots=True)
class Check:
    """One limit, applied to one candidate."""

    limit: str
    """The gate's field."""
    bound: float
    value: float | None
    """None where it could not be found."""
    interval: tuple[float, float] | None
    """95 % interval; None for what is exact or not measured."""
    passed: bool
    text: str
    """The same in words."""

    def as_json(self) -> dict[str, Any]:
        """Return plain JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class _Rule:
    """How a limit on quality is computed."""

    what: str
    unit: str
    against_base: bool
    statistic: Callable[[str, str], Statistic]
    """(candidate, base or teacher) → the figure, of sums over documents."""


def _mean(column: str) -> Callable[[str, str], Statistic]:
    return lambda name, other: lambda sums: sums[f"{name}/{column}"] / sums["tokens"]


def _perplexity_ratio(minus: float) -> Callable[[str, str], Statistic]:
    return lambda name, other: lambda s: np.exp((s[f"{name}/nll"] - s[f"{other}/nll"]) / s["tokens"]) - minus


_QUALITY: Mapping[str, _Rule] = {
    "max_kl_to_base": _Rule("KL to its base", " nats/token", True, _mean("kl_to_base")),
    "min_agreement_with_base": _Rule("agreement with its base", "", True, _mean("agree_with_base")),
    "max_perplexity_increase_fraction": _Rule("perplexity increase over its base", "", True, _perplexity_ratio(1.0)),
    "max_kl_to_teacher": _Rule("KL to the teacher", " nats/token", False, _mean("kl")),
    "min_agreement_with_teacher": _Rule("agreement with the teacher", "", False, _mean("agree")),
    "max_perplexity_ratio_to_teacher": _Rule("perplexity over the teacher's", "x", False, _perplexity_ratio(0.0)),
}
_EXACT: Mapping[str, tuple[str, str, str]] = {
    "min_compression_x": ("compression_x", "compression against the teacher", "x"),
    "max_size_bytes": ("size_bytes", "size", " bytes"),
    "max_latency_p50_ms": ("latency_p50_ms", "median latency", " ms/token"),
    "max_peak_memory_bytes": ("peak_memory_bytes", "peak memory", " bytes"),
}


def check_candidate(
    gate: Gate,
    name: str,
    entry: Mapping[str, Any],
    *,
    speed: Mapping[str, Any],
    teacher: str,
    bootstrap: PairedBootstrap,
) -> list[Check]:
    """Apply every limit of the gate that holds for a candidate.

    Args:
        gate: the limits.
        name: the candidate.
        entry: its entry in `scores.json`.
        speed: its entry in `speed.json`; empty where speed was not measured.
        teacher: name of the teacher's rows among the documents.
        bootstrap: resamples of the documents, with the columns of every model.
    """
    checks = []
    for limit, bound in gate:
        if bound is None:
            continue
        if limit in _EXACT:
            checks.append(_check_exact(limit, bound, {**speed, **entry}))
            continue
        rule = _QUALITY[limit]
        if not rule.against_base:
            checks.append(_check_quality(limit, bound, rule, bootstrap, name, teacher))
        elif entry["kind"] == "quantized" and entry["base"] is None:
            text = f"{rule.what} is not known: the model that was quantized is not among the models that were scored"
            checks.append(Check(limit, bound, None, None, False, text))
        elif entry["kind"] == "quantized":
            checks.append(_check_quality(limit, bound, rule, bootstrap, name, entry["base"]))
    return checks


def _check_quality(limit: str, bound: float, rule: _Rule, bootstrap: PairedBootstrap, name: str, other: str) -> Check:
    try:
        found = bootstrap.interval(rule.statistic(name, other))
    except ValueError as error:
        raise StageFailed(f"{rule.what} of {name!r} has no interval: {error}; its figures are broken") from error
    at_most = limit.startswith("max")
    excess = found.high - bound if at_most else bound - found.low
    shown = f"{rule.what} {found.estimate:.4g}{rule.unit} (95% interval {found.low:.4g} to {found.high:.4g})"
    if excess <= 0:
        text = f"{shown}, within the limit of {'at most' if at_most else 'at least'} {bound:g}"
    elif at_most:
        text = f"{shown}, its upper end is {excess:.3g} above the limit of {bound:g}"
    else:
        text = f"{shown}, its lower end is {excess:.3g} below the limit of {bound:g}"
    return Check(limit, bound, found.estimate, (found.low, found.high), excess <= 0, text)


def _check_exact(limit: str, bound: float, figures: Mapping[str, Any]) -> Check:
    key, what, unit = _EXACT[limit]
    value = figures.get(key)
    if value is None:
        reason = f" ({figures['reason']})" if figures.get("reason") else ""
        text = f"{what} is not measured{reason}, so the limit of {bound:g}{unit} is not shown to be kept"
        return Check(limit, bound, None, None, False, text)
    assert math.isfinite(value), f"{key} is {value}"
    at_most = limit.startswith("max")
    passed = value <= bound if at_most else value >= bound
    if passed:
        text = f"{what} {value:.4g}{unit}, within the limit of {'at most' if at_most else 'at least'} {bound:g}{unit}"
    else:
        side = "above" if at_most else "below"
        text = f"{what} {value:.4g}{unit}, {abs(value - bound):.3g}{unit} {side} the limit of {bound:g}{unit}"
    return Check(limit, bound, value, None, passed, text)
