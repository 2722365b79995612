"""What scores say: the sums of each document as columns of one paired bootstrap, and the figures of each model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from stages.errors import StageFailed
from stages.ops.statistics import PairedBootstrap

__all__ = ["REFERENCE", "Evidence", "read_evidence"]

REFERENCE = "@reference"
"""Name of the reference's rows in `documents.parquet` where it is not among the models (as `evaluate` writes it)."""
COLUMNS = ("nll", "kl", "agree", "kl_to_base", "agree_with_base")
FEW_DOCUMENTS = 30
"""Below this a bootstrap over documents is rough; the report says so."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """Everything that the verdict rests on."""

    scores: Mapping[str, Any]
    """`scores.json`."""
    speed: Mapping[str, Mapping[str, Any]]
    """Each model's entry of `speed.json`; empty where speed was not measured."""
    bootstrap: PairedBootstrap
    num_documents: int

    @property
    def models(self) -> Mapping[str, Mapping[str, Any]]:
        """Each model's entry of `scores.json`."""
        entries: Mapping[str, Mapping[str, Any]] = self.scores["models"]
        return entries

    @property
    def teacher(self) -> str:
        """Name of the teacher's rows among the documents."""
        return self.scores["reference"] or REFERENCE

    def perplexity(self, name: str) -> float:
        """Return the perplexity of a model, or of the teacher where it is not among them."""
        return self.bootstrap.estimate(lambda sums: np.exp(sums[f"{name}/nll"] / sums["tokens"]))

    def interval(self, name: str, figure: str) -> list[float]:
        """Return the 95 % interval of a model's `perplexity`, or of its mean `kl` or `agree`."""
        if figure == "perplexity":
            found = self.bootstrap.interval(lambda sums: np.exp(sums[f"{name}/nll"] / sums["tokens"]))
        else:
            found = self.bootstrap.interval(lambda sums: sums[f"{name}/{figure}"] / sums["tokens"])
        return [found.low, found.high]


def read_evidence(
    scores: Mapping[str, Any],
    documents: Mapping[str, Any],
    speed: Mapping[str, Any] | None,
    *,
    num_resamples: int,
    seed: int,
) -> Evidence:
    """Align the documents of all models and draw the resamples.

    Args:
        scores: `scores.json`.
        documents: the columns of `documents.parquet` as arrays.
        speed: `speed.json`, or None.
        num_resamples: resamples of the documents.
        seed: seed of the draws.

    Raises:
        StageFailed: models were scored on different documents, or on fewer than two.
    """
    teacher = scores["reference"] or REFERENCE
    names = list(dict.fromkeys([teacher, *scores["models"]]))
    columns: dict[str, Any] = {}
    expected: Any = None
    for name in names:
        rows = np.flatnonzero(np.asarray(documents["model"]) == name)
        rows = rows[np.argsort(np.asarray(documents["document_id"])[rows], kind="stable")]
        identity = np.stack([np.asarray(documents[key])[rows] for key in ("document_id", "tokens")])
        if expected is None:
            expected = identity
            columns["tokens"] = identity[1].astype(float)
        if not np.array_equal(identity, expected):
            raise StageFailed(
                f"{name!r} was scored on {identity.shape[1]} documents that are not the teacher's {expected.shape[1]}; "
                "expected the same documents and tokens for every model: run the evaluate step again"
            )
        for column in COLUMNS:
            values = np.asarray(documents[column])[rows].astype(float)
            if not np.isnan(values).any():  # columns about a base are null for models without one
                columns[f"{name}/{column}"] = values
    if expected.shape[1] < 2:
        raise StageFailed(
            f"the models were scored on {expected.shape[1]} documents; expected two or more, since a difference is "
            "judged by how it varies over documents: prepare a larger split"
        )
    bootstrap = PairedBootstrap(columns, num_resamples=num_resamples, seed=seed)
    return Evidence(scores, dict(speed["models"]) if speed else {}, bootstrap, expected.shape[1])
