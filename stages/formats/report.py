"""`report.json`: the verdict on all candidates, and each candidate with the same `final/*` metrics as every other."""

from collections.abc import Mapping
from typing import ClassVar, Literal, Self

from pydantic import Field

from stages.contract import Split
from stages.formats.json_format import FormatModel, JsonFormat

__all__ = ["Check", "QualityClaim", "ReferenceRow", "Report", "ReportedCandidate", "Verdict"]


class Check(FormatModel):
    """One limit of the gate, applied to one candidate."""

    limit: str
    """The gate's field."""
    bound: float
    value: float | None
    """None where it could not be found."""
    interval: tuple[float, float] | None
    """95 % interval; None for what is exact or not measured."""
    p_value: float | None = None
    """One-sided p-value against the limit being kept, of this check alone; None where there is no interval."""
    passed: bool
    text: str
    """The same as a sentence."""


class QualityClaim(FormatModel):
    """Whether one model, or method, predicts held-out text better than another, beyond noise."""

    claim: str
    about: Literal["checkpoint", "method"]
    """A method's claim rests on several training seeds of each side; else nothing is said of the method."""
    models: dict[str, tuple[str, ...]]
    """Of each side, the contender's first: its name → the candidates that it was judged by."""
    difference_nats_per_token: float
    interval: tuple[float, float]
    """95 % interval of the difference."""
    minimum_detectable_nats: float
    """The true difference that a comparison like this one shows in 80 % of cases."""
    perplexities: dict[str, float]
    """Of each side; of several models that of their average cross-entropy."""
    holds: bool
    text: str


class Verdict(FormatModel):
    """What was decided, and why."""

    outcome: Literal["accepted", "rejected", "unjudged"]
    """Unjudged: the gate has no limit."""
    champion: str | None
    """Name of the accepted candidate."""
    registered_name: str
    """Name in the model registry."""
    reasons: tuple[str, ...]
    claims: tuple[QualityClaim, ...]
    checks: dict[str, tuple[Check, ...]]
    """Candidate → its checks; the teacher has none."""
    beaten_by: dict[str, str] = Field(default_factory=dict)
    """Candidate → another that is both smaller and closer to the teacher, so that it is never promoted."""
    warnings: tuple[str, ...] = ()
    """What a reader must know before trusting any of this."""


class ReportedCandidate(FormatModel):
    """A candidate as people compare it."""

    name: str
    fingerprint: str
    folder: str
    uri: str
    """The folder to load it from."""
    kind: str
    base: str | None
    params: dict[str, str]
    """Few and short: the axes that people plot."""
    metrics: dict[str, float]
    """`final/…`; one that is not known is absent."""
    intervals: dict[str, tuple[float, float]]
    """95 % intervals of some of them."""
    notes: dict[str, str]
    """Metric → why it is absent."""


class ReferenceRow(FormatModel):
    """A row to compare candidates with, which is none: an n-gram model, the teacher run again."""

    name: str
    text: str
    """What it is."""
    metrics: dict[str, float]
    """`final/…`; one that is not known is absent."""


class Report(JsonFormat):
    """`report.json`."""

    FILE: ClassVar = "report.json"
    SCHEMA: ClassVar = 2

    verdict: Verdict
    reference: str | None
    split: Split
    tokens: int
    documents: int
    effective_documents: float
    """How many equally long documents they are worth."""
    dtype: str
    """Number format in which models computed."""
    minimum_detectable_nats: float
    """The true difference in cross-entropy to the teacher that would be shown in 80 % of cases, for every candidate."""
    candidates: tuple[ReportedCandidate, ...]
    references: tuple[ReferenceRow, ...] = ()
    """Rows beside the candidates'."""

    def with_metric(self, metric: str, values: Mapping[str, float]) -> Self:
        """Return the report with a further metric of some candidates, by their names."""
        candidates = tuple(
            candidate.model_copy(update={"metrics": {**candidate.metrics, metric: values[candidate.name]}})
            if candidate.name in values
            else candidate
            for candidate in self.candidates
        )
        return self.model_copy(update={"candidates": candidates})
