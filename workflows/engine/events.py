"""What the driver tells the ledger: plain frozen values, journaled as JSON before anybody reads them.

Times are milliseconds since the epoch, as MLflow counts them. A step is named within its run.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]


@dataclass(frozen=True, slots=True)
class RunOpened:
    """One execution of a workflow began."""

    run: str
    workflow: str
    experiment: str
    at_ms: int
    params: Mapping[str, str]
    """Few and short: the workflow's parameters that differ from their defaults."""
    tags: Mapping[str, str]
    """git commit, user, command, store."""


@dataclass(frozen=True, slots=True)
class StepOpened:
    """A step's attempt began, or a cached step was found."""

    run: str
    step: str
    attempt: int
    at_ms: int
    stage: str
    fingerprint: str
    cache: Literal["hit", "miss"]
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CurvePoints:
    """Points of a step's curves."""

    run: str
    step: str
    attempt: int
    points: tuple[tuple[str, float, int, int], ...]
    """(metric name, value, step, at_ms)."""


@dataclass(frozen=True, slots=True)
class StepClosed:
    """A step's attempt ended."""

    run: str
    step: str
    attempt: int
    at_ms: int
    status: RunStatus
    metrics: Mapping[str, float]
    params: Mapping[str, str]
    tags: Mapping[str, str]
    config: str
    """The stage's whole config as JSON; becomes an MLflow artifact."""


@dataclass(frozen=True, slots=True)
class CandidateFound:
    """A model that could ship, with the same `final/*` metrics as every other."""

    run: str
    scores: str
    """Fingerprint of the scores that it was judged by: with the name, the candidate's identity in the ledger."""
    name: str
    at_ms: int
    artifact: str
    """URI of the folder to load the checkpoint from."""
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    tags: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class VerdictReached:
    """The gate decided; the registry follows."""

    run: str
    scores: str
    registered_name: str
    champion: str | None
    """Name of the accepted candidate, or None."""
    at_ms: int
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RunClosed:
    """One execution of a workflow ended."""

    run: str
    at_ms: int
    status: RunStatus
    note: str
    """Markdown: what came out and how to reproduce it."""
    files: tuple[str, ...] = ()
    """URIs of small files (leaderboard, figure) that become MLflow artifacts of the run."""


RunEvent = RunOpened | StepOpened | CurvePoints | StepClosed | CandidateFound | VerdictReached | RunClosed


def to_json(record: RunEvent) -> dict[str, Any]:
    """Return a record as JSON, with its type's name."""
    return {"record": type(record).__name__, **asdict(record)}


def from_json(value: Mapping[str, Any]) -> RunEvent:
    """Return the record that `to_json` wrote."""
    types: dict[str, type[RunEvent]] = {
        t.__name__: t
        for t in (RunOpened, StepOpened, CurvePoints, StepClosed, CandidateFound, VerdictReached, RunClosed)
    }
    fields = dict(value)
    kind = types[fields.pop("record")]
    if "points" in fields:
        fields["points"] = tuple(tuple(point) for point in fields["points"])
    for name in ("reasons", "files"):
        if name in fields:
            fields[name] = tuple(fields[name])
    return kind(**fields)
