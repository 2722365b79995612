"""From sums over documents to the scores that are written: `scores.json` and the rows of `documents.parquet`.

Cross-entropy, KL and agreement are means over all targets (a sum over documents divided by the number of targets),
never means of means; perplexity is the exponential of the cross-entropy.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stages.candidates import Candidate
from stages.errors import StageFailed
from stages.evaluate.passes import REFERENCE

__all__ = ["Scored", "build_documents", "build_scores"]

SCHEMA = pa.schema(
    {
        "model": pa.string(),
        "document_id": pa.int64(),
        "tokens": pa.int64(),
        "nll": pa.float64(),
        "kl": pa.float64(),
        "agree": pa.int64(),
        "kl_to_base": pa.float64(),
        "agree_with_base": pa.int64(),
    }
)


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


def build_scores(scored: Sequence[Scored]) -> dict[str, dict[str, Any]]:
    """Return the entry of each candidate for `scores.json`; the first of `scored` is the reference."""
    reference = scored[0]
    entries = {}
    for one in scored:
        candidate, tokens = one.candidate, one.total("tokens")
        if candidate.name == REFERENCE:
            continue
        cross_entropy = one.total("nll") / tokens
        kl, agree = _against(one, reference.candidate.name)
        kl_base, agree_base = _against(one, candidate.base) if candidate.base else (None, None)
        entries[candidate.name] = {
            "fingerprint": candidate.artifact.fingerprint,
            "folder": candidate.folder,
            "uri_prefix": candidate.uri_prefix,
            "kind": candidate.kind,
            "base": candidate.base,
            "scheme": candidate.scheme,
            "axes": dict(one.axes),
            "parameters": one.parameters,
            "size_bytes": candidate.size_bytes,
            "bits_per_weight": 8 * candidate.size_bytes / one.parameters,
            "compression_x": reference.candidate.size_bytes / candidate.size_bytes,
            "cross_entropy": cross_entropy,
            "perplexity": _perplexity(candidate.name, cross_entropy),
            "kl_to_reference": float(kl.sum()) / tokens,
            "agreement": float(agree.sum()) / tokens,
            "kl_to_base": None if kl_base is None else float(kl_base.sum()) / tokens,
            "agreement_with_base": None if agree_base is None else float(agree_base.sum()) / tokens,
        }
    return entries


def build_documents(scored: Sequence[Scored]) -> Any:
    """Return the table of `documents.parquet`: for each model and document, sums over its targets.

    Includes the reference, under `@reference` where it is not among the models. Columns about a base are null for
    models that were not quantized.
    """
    tables = []
    for one in scored:
        kl, agree = _against(one, scored[0].candidate.name)
        columns = {
            "model": np.repeat(one.candidate.name, len(kl)),
            "document_id": one.sums["document_id"],
            "tokens": one.sums["tokens"].astype(np.int64),
            "nll": one.sums["nll"],
            "kl": kl,
            "agree": agree.astype(np.int64),
            "kl_to_base": pa.nulls(len(kl), pa.float64()),
            "agree_with_base": pa.nulls(len(kl), pa.int64()),
        }
        if one.candidate.base:
            kl_to_base, agree_with_base = _against(one, one.candidate.base)
            columns |= {"kl_to_base": kl_to_base, "agree_with_base": agree_with_base.astype(np.int64)}
        tables.append(pa.table(columns, schema=SCHEMA))
    return pa.concat_tables(tables)


def _against(one: Scored, other: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the sums of KL and agreement of each document; a model against itself agrees exactly."""
    if other == one.candidate.name:
        return np.zeros_like(one.sums["nll"]), one.sums["tokens"]
    return one.sums[f"kl/{other}"], one.sums[f"agree/{other}"]


def _perplexity(name: str, cross_entropy: float) -> float:
    try:
        return math.exp(cross_entropy)
    except OverflowError:
        raise StageFailed(
            f"{name!r} has a cross-entropy of {cross_entropy:.4g} nats per token, whose perplexity is not a number; "
            "its weights are broken"
        ) from None
