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
from stages.contract import Artifact, Split
from stages.errors import StageFailed
from stages.evaluate.text import TextFacts
from stages.formats.documents import ModelDocuments
from stages.formats.scores import REFERENCE, CandidateScores, ReferenceScores, Scores

__all__ = ["Scored", "build_documents", "build_models", "build_scores"]


@dataclass(frozen=True, slots=True)
class Scored:
    """What a pass over one model found."""

    candidate: Candidate
    sums: Mapping[str, NDArray[Any]]
    """`document_id`, `tokens`, `nll`, and `kl/<name>`, `agree/<name>` for each model it was compared with; `[D]`."""
    parameters: int
    axes: Mapping[str, str]
    floor: Mapping[str, float] | None = None
    """Of the reference: its sums against itself, run again (`NoiseFloor`)."""

    @property
    def bytes_16bit(self) -> int:
        """Bytes of its architecture's parameters in 16 bits each."""
        return 2 * self.parameters

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


def build_scores(
    scored: Sequence[Scored],
    text: TextFacts,
    *,
    split: Split,
    dtype: str,
    rows: int,
    data: Artifact,
    reference: Artifact,
) -> Scores:
    """Return `scores.json`; the first of `scored` is the reference."""
    first, models = scored[0], build_models(scored, text)
    bytes_per_token = text.text_bytes / first.total("tokens")
    grams = {"bigram": text.bigram_nll, "trigram": text.trigram_nll}
    floor = None
    if first.floor is not None:
        num = first.floor["tokens"]
        floor = _reference_scores(
            f"the teacher run again in {dtype} on {num:,.0f} of the tokens, in batches of half the rows",
            first.floor["nll"] / num,
            bytes_per_token,
            kl=first.floor["kl/self"] / num,
            agreement=first.floor["agree/self"] / num,
        )
    return Scores(
        split=split,
        dtype=dtype,
        tokens=int(first.total("tokens")),
        text_bytes=text.text_bytes,
        documents=len(first.sums["document_id"]),
        rows=rows,
        dataset_fingerprint=data.fingerprint,
        reference=first.candidate.name if first.candidate.name in models else None,
        reference_fingerprint=reference.fingerprint,
        reference_bytes=first.candidate.size_bytes,
        reference_bytes_16bit=first.bytes_16bit,
        noise_floor=floor,
        models=models,
        **{
            name: _reference_scores(
                f"a Kneser-Ney {name} of {text.training_tokens:,} training tokens", nll, bytes_per_token
            )
            for name, nll in grams.items()
            if nll is not None
        },
    )


def _reference_scores(
    text: str, nll: float, bytes_per_token: float, *, kl: float | None = None, agreement: float | None = None
) -> ReferenceScores:
    return ReferenceScores(
        text=text,
        cross_entropy=nll,
        perplexity=_perplexity(text, nll),
        bits_per_byte=nll / math.log(2) / bytes_per_token,
        kl_to_reference=kl,
        agreement=agreement,
    )


def build_models(scored: Sequence[Scored], text: TextFacts) -> dict[str, CandidateScores]:
    """Return the scores of each candidate by its name; the first of `scored` is the reference."""
    return {
        one.candidate.name: _candidate_scores(one, scored[0], text) for one in scored if one.candidate.name != REFERENCE
    }


def _candidate_scores(one: Scored, reference: Scored, text: TextFacts) -> CandidateScores:
    candidate = one.candidate
    cross_entropy = one.total("nll") / one.total("tokens")
    kl, agreement = one.means_against(reference.candidate.name)
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
        compression_x=reference.bytes_16bit / candidate.size_bytes,
        cross_entropy=cross_entropy,
        perplexity=_perplexity(candidate.name, cross_entropy),
        bits_per_byte=one.total("nll") / math.log(2) / text.text_bytes,
        kl_to_reference=kl,
        agreement=agreement,
        kl_to_base=kl_to_base,
        agreement_with_base=agreement_with_base,
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
