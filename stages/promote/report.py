"""Build `report.json`: the verdict, and every candidate with the same `final/*` metrics as every other.

A metric that is not known is absent, never zero; where a reason is known it stands in the candidate's notes.
"""

from collections.abc import Iterator

from stages.formats.report import ReferenceRow, Report, ReportedCandidate, Verdict
from stages.formats.scores import CandidateScores, ReferenceScores
from stages.formats.speed import CandidateSpeed
from stages.models.serving import describe
from stages.promote.evidence import Evidence
from stages.promote.serving_check import answers_about

__all__ = ["build_report"]

_INTERVALS = {"final/perplexity": "perplexity", "final/kl_to_teacher": "kl", "final/agreement": "agree"}


def build_report(evidence: Evidence, verdict: Verdict) -> Report:
    """Return `report.json`."""
    scores = evidence.scores
    return Report(
        verdict=verdict,
        reference=scores.reference,
        split=scores.split,
        tokens=scores.tokens,
        documents=scores.documents,
        effective_documents=evidence.resamples.effective,
        dtype=scores.dtype,
        minimum_detectable_nats=_minimum_detectable(evidence),
        references=tuple(_references(evidence)),
        candidates=tuple(_candidate(evidence, name) for name in evidence.models),
    )


def _minimum_detectable(evidence: Evidence) -> float:
    teacher = evidence.teacher
    return max(
        (evidence.gain([teacher], [name]).minimum_detectable() for name in evidence.models if name != teacher),
        default=0.0,
    )


def _references(evidence: Evidence) -> Iterator[ReferenceRow]:
    scores = evidence.scores
    rows = {"trigram": scores.trigram, "bigram": scores.bigram, "teacher again": scores.noise_floor}
    for name, row in rows.items():
        if row is not None:
            known = {metric: value for metric, value in _text_metrics(row).items() if value is not None}
            yield ReferenceRow(name=name, text=row.text, metrics=known)


def _text_metrics(scores: CandidateScores | ReferenceScores) -> dict[str, float | None]:
    """Return how well the held-out text is predicted, by a candidate or by a row to compare it with."""
    return {
        "final/perplexity": scores.perplexity,
        "final/cross_entropy": scores.cross_entropy,
        "final/bits_per_byte": scores.bits_per_byte,
        "final/kl_to_teacher": scores.kl_to_reference,
        "final/agreement": scores.agreement,
    }


def _candidate(evidence: Evidence, name: str) -> ReportedCandidate:
    scores, measured = evidence.models[name], evidence.speed(name)
    speed = _speed_metrics(measured)
    quality = _quality_metrics(scores)
    quality["final/perplexity_delta_to_teacher"] = scores.perplexity - evidence.perplexity(evidence.teacher)
    if scores.base is not None:
        quality["final/perplexity_delta_to_base"] = scores.perplexity - evidence.perplexity(scores.base)
    reason, answers = measured.reason, answers_about(scores, measured)
    return ReportedCandidate(
        name=name,
        fingerprint=scores.fingerprint,
        folder=scores.folder,
        uri=scores.uri_prefix,
        kind=scores.kind,
        base=scores.base,
        params={"method": scores.method or "none", **scores.axes, "served_by": describe(answers)},
        metrics={metric: float(value) for metric, value in {**quality, **speed}.items() if value is not None},
        intervals={metric: evidence.interval(name, figure) for metric, figure in _INTERVALS.items()},
        notes={metric: reason for metric, value in speed.items() if value is None} if reason else {},
        served_by={runtime: found.text for runtime, found in answers.items()},
        speed_by_batch=measured.by_batch,
    )


def _quality_metrics(scores: CandidateScores) -> dict[str, float | None]:
    return {
        **_text_metrics(scores),
        "final/size_bytes": scores.size_bytes,
        "final/compression_x": scores.compression_x,
        "final/bits_per_weight": scores.bits_per_weight,
        "final/parameters": scores.parameters,
        "final/kl_to_base": scores.kl_to_base,
        "final/agreement_with_base": scores.agreement_with_base,
    }


def _speed_metrics(speed: CandidateSpeed) -> dict[str, float | None]:
    return {
        "final/prefill_p50_ms": speed.prefill_p50_ms,
        "final/prefill_p95_ms": speed.prefill_p95_ms,
        "final/latency_p50_ms": speed.latency_p50_ms,
        "final/latency_p95_ms": speed.latency_p95_ms,
        "final/tokens_per_second": speed.tokens_per_second,
        "final/throughput_tokens_per_second": speed.throughput_tokens_per_second,
        "final/peak_memory_bytes": speed.peak_memory_bytes,
    }
