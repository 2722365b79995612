"""What scores say: the sums of each document as columns that are resampled together, and the figures of each model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stages.errors import StageFailed
from stages.formats.documents import ModelDocuments
from stages.formats.scores import REFERENCE, CandidateScores, Scores
from stages.formats.speed import CandidateSpeed, Speed
from stages.ops.statistics import Estimate, Resamples

__all__ = ["Evidence", "read_evidence"]

NOT_MEASURED = CandidateSpeed()
"""The speed of a model where none was measured, for no reason that is known."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """Everything that the verdict rests on."""

    scores: Scores
    speeds: Mapping[str, CandidateSpeed]
    """Empty where speed was not measured."""
    resamples: Resamples

    @property
    def models(self) -> Mapping[str, CandidateScores]:
        """Each model's scores."""
        return self.scores.models

    @property
    def teacher(self) -> str:
        """Name of the teacher's rows among the documents."""
        return self.scores.reference or REFERENCE

    def speed(self, name: str) -> CandidateSpeed:
        """Return a model's speed."""
        return self.speeds.get(name, NOT_MEASURED)

    def perplexity(self, name: str) -> float:
        """Return the perplexity of a model, or of the teacher where it is not among them."""
        return self.resamples.value(lambda sums: np.exp(sums[f"{name}/nll"] / sums["tokens"]))

    def interval(self, name: str, figure: str) -> tuple[float, float]:
        """Return the 95 % interval of a model's `perplexity`, or of its mean `kl` or `agree`."""
        if figure == "perplexity":
            found = self.resamples.estimate(lambda sums: np.exp(sums[f"{name}/nll"] / sums["tokens"])).interval()
        else:
            found = self.resamples.estimate(lambda sums: sums[f"{name}/{figure}"] / sums["tokens"]).interval()
        return found.low, found.high

    def gain(self, baselines: Sequence[str], contenders: Sequence[str]) -> Estimate:
        """Return by how many nats per token some models predict the text better than others, on average."""
        return self.resamples.gain([f"{name}/nll" for name in baselines], [f"{name}/nll" for name in contenders])


def read_evidence(
    scores: Scores, documents: Mapping[str, ModelDocuments], speed: Speed | None, *, num_resamples: int, seed: int
) -> Evidence:
    """Align the documents of all models and draw the resamples.

    Args:
        scores: the scores of each model.
        documents: each model's sums, the reference's too.
        speed: the speed of each model, or None.
        num_resamples: resamples of the documents.
        seed: seed of the draws.

    Raises:
        StageFailed: models were scored on different documents, or on fewer than two.
    """
    teacher = scores.reference or REFERENCE
    columns: dict[str, NDArray[np.float64]] = {}
    expected = _identity(documents, teacher)
    num_documents = expected.shape[1]
    for name in dict.fromkeys([teacher, *scores.models]):
        found = _identity(documents, name)
        if not np.array_equal(found, expected):
            raise StageFailed(
                f"{name!r} was scored on {found.shape[1]} documents that are not the teacher's {num_documents}; "
                "expected the same documents and tokens for every model: run the evaluate step again"
            )
        columns |= _columns(name, documents[name])
    if num_documents < 2:
        raise StageFailed(
            f"the models were scored on {num_documents} documents; expected two or more, since a difference is "
            "judged by how it varies over documents: prepare a larger split"
        )
    resamples = Resamples(columns, expected[1].astype(float), num_resamples=num_resamples, seed=seed)
    return Evidence(scores, speed.models if speed else {}, resamples)


def _identity(documents: Mapping[str, ModelDocuments], name: str) -> NDArray[np.int64]:
    """Return the documents of a model and their numbers of targets `[2, D]`; none where it has no rows."""
    if name not in documents:
        return np.empty((2, 0), np.int64)
    return np.stack([documents[name].document_id, documents[name].tokens])


def _columns(name: str, documents: ModelDocuments) -> dict[str, NDArray[np.float64]]:
    columns = {
        "nll": documents.nll,
        "kl": documents.kl,
        "agree": documents.agree,
        "kl_to_base": documents.kl_to_base,
        "agree_with_base": documents.agree_with_base,
    }
    return {f"{name}/{key}": values.astype(float) for key, values in columns.items() if values is not None}
