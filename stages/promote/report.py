"""Build `report.json`: the verdict, and every candidate with the same `final/*` metrics as every other.

A metric that is not known is absent, never zero; where a reason is known it stands in the candidate's notes.
"""

from collections.abc import Mapping
from typing import Any

from stages.promote.evidence import Evidence
from stages.promote.verdict import Verdict

__all__ = ["build_report"]

_FROM_SCORES = {
    "final/perplexity": "perplexity",
    "final/cross_entropy": "cross_entropy",
    "final/kl_to_teacher": "kl_to_reference",
    "final/agreement": "agreement",
    "final/size_bytes": "size_bytes",
    "final/compression_x": "compression_x",
    "final/bits_per_weight": "bits_per_weight",
    "final/parameters": "parameters",
    "final/kl_to_student": "kl_to_base",
    "final/agreement_with_student": "agreement_with_base",
}
_FROM_SPEED = ("prefill_p50_ms", "latency_p50_ms", "latency_p95_ms", "tokens_per_second", "peak_memory_bytes")
_INTERVALS = {"final/perplexity": "perplexity", "final/kl_to_teacher": "kl", "final/agreement": "agree"}


def build_report(evidence: Evidence, verdict: Verdict, *, registered_name: str) -> dict[str, Any]:
    """Return `report.json`."""
    scores = evidence.scores
    return {
        "verdict": verdict.as_json(registered_name),
        "reference": scores["reference"],
        "split": scores["split"],
        "tokens": scores["tokens"],
        "documents": scores["documents"],
        "candidates": [_candidate(evidence, name) for name in evidence.models],
    }


def _candidate(evidence: Evidence, name: str) -> dict[str, Any]:
    entry, speed = evidence.models[name], evidence.speed.get(name, {})
    known = {metric: entry[key] for metric, key in _FROM_SCORES.items() if entry[key] is not None}
    known |= {f"final/{key}": speed[key] for key in _FROM_SPEED if speed.get(key) is not None}
    known["final/perplexity_delta_to_teacher"] = entry["perplexity"] - evidence.perplexity(evidence.teacher)
    if entry["base"] is not None:
        base = evidence.models[entry["base"]]
        known["final/perplexity_delta_to_student"] = entry["perplexity"] - base["perplexity"]
    return {
        "name": name,
        "fingerprint": entry["fingerprint"],
        "folder": entry["folder"],
        "uri": entry["uri_prefix"],
        "kind": entry["kind"],
        "base": entry["base"],
        "params": {"method": entry["scheme"] or "none", **entry["axes"]},
        "metrics": {metric: float(value) for metric, value in known.items()},
        "intervals": {metric: evidence.interval(name, figure) for metric, figure in _INTERVALS.items()},
        "notes": _notes(speed),
    }


def _notes(speed: Mapping[str, Any]) -> dict[str, str]:
    if not speed.get("reason"):
        return {}
    return {f"final/{key}": speed["reason"] for key in _FROM_SPEED if speed.get(key) is None}
