"""From sums over documents to the scores that are written: `scores.json` and `documents.parquet`.

Cross-entropy, KL and agreement are means over all targets (a sum over documents divided by the number of targets),
never means of means; perplexity is the exponential of the cross-entropy.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.candidates import Candidate
from stages.errors import StageFailed
from stages.formats.documents import ModelDocuments
from stages.formats.scores import REFERENCE, CandidateScores

__all__ = ["Scored", "build_documents", "build_scores"]


@dataclass(frozen=True, slots=True)
class Scored:
    """What a pass over one model found."""

    candidate: Candidate
    sums: Mapping[str, NDArray[Any]]
    """`document_id`, `tokens`, `nll`, and `kl/<name>`, `agree/<name>` for each model it was compared with; `[D]`."""
    parameters: int
    axes: Mapping[str, str]

    def total(self, column: str) -> float:
        """Return a column's sum over all documents."""
        return float(self.sums[column].sum())

    def against(self, other: str) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return each document's sums of KL and of agreement; a model against itself agrees exactly."""
        if other == self.candidate.name:
            return np.zeros_like(self.sums["nll"]), self.sums["tokens"]
        return self.sums[f"kl/{other}"], self.sums[f"agree/{other}"]

    def means_against(self, other: str) -> tuple[float, float]:
        """Return the mean KL and the mean agreement over all targets."""
        kl, agree = self.against(other)
        return float(kl.sum()) / self.total("tokens"), float(agree.sum()) / self.total("tokens")


def build_scores(scored: Sequence[Scored]) -> dict[str, CandidateScores]:
    """Return the scores of each candidate by its name; the first of `scored` is the reference."""
    reference = scored[0].candidate
    return {one.candidate.name: _candidate_scores(one, reference) for one in scored if one.candidate.name != REFERENCE}


def _candidate_scores(one: Scored, reference: Candidate) -> CandidateScores:
    candidate = one.candidate
    cross_entropy = one.total("nll") / one.total("tokens")
    kl, agreement = one.means_against(reference.name)
    kl_to_base, agreement_with_base = one.means_against(candidate.base) if candidate.base else (None, None)
    return CandidateScores(
        fingerprint=candidate.artifact.fingerprint,
        folder=candidate.folder,
        uri_prefix=candidate.uri_prefix,
        kind=candidate.kind,
        base=candidate.base,
        base_fingerprint=candidate.base_fingerprint,
        method=candidate.method,
        axes=dict(one.axes),
        parameters=one.parameters,
        size_bytes=candidate.size_bytes,
        bits_per_weight=8 * candidate.size_bytes / one.parameters,
        compression_x=reference.size_bytes / candidate.size_bytes,
        cross_entropy=cross_entropy,
        perplexity=_perplexity(candidate.name, cross_entropy),
        kl_to_reference=kl,
        agreement=agreement,
        kl_to_base=kl_to_base,
        agreement_with_base=agreement_with_base,
        config=candidate.config,
    )


def build_documents(scored: Sequence[Scored]) -> dict[str, ModelDocuments]:
    """Return each model's sums for `documents.parquet`, the reference's too; the first of `scored` is the reference."""
    found = {}
    for one in scored:
        kl, agree = one.against(scored[0].candidate.name)
        base = one.candidate.base
        kl_to_base, agree_with_base = one.against(base) if base else (None, None)
        found[one.candidate.name] = ModelDocuments(
            document_id=one.sums["document_id"],
            tokens=one.sums["tokens"].astype(np.int64),
            nll=one.sums["nll"],
            kl=kl,
            agree=agree.astype(np.int64),
            kl_to_base=kl_to_base,
            agree_with_base=None if agree_with_base is None else agree_with_base.astype(np.int64),
        )
    return found


def _perplexity(name: str, cross_entropy: float) -> float:
    try:
        return math.exp(cross_entropy)
    except OverflowError:
        raise StageFailed(
            f"{name!r} has a cross-entropy of {cross_entropy:.4g} nats per token, whose perplexity is not a number; "
            "its weights are broken"
        ) from None
