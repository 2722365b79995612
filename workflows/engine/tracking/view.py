"""What MLflow is told of each record: names, tags and limits, and several records of one step drawn together. Pure.

Promises: an entry holds only what MLflow accepts (allowed characters, lengths, finite metrics), and names every MLflow
run by a key that is the same whenever the same records are read again. Does not: import MLflow or hold progress.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from workflows.engine.events import (
    CandidateFound,
    CurvePoints,
    RunClosed,
    RunEvent,
    RunOpened,
    RunStatus,
    StepClosed,
    StepOpened,
    VerdictReached,
)

__all__ = [
    "KEY",
    "RUN",
    "Entry",
    "Row",
    "candidate_key",
    "coalesce",
    "finite",
    "legal_name",
    "legal_params",
    "legal_tags",
    "seen_by",
]

KEY = "stillhouse.key"
"""Tag that says which MLflow run is meant; it is searched before one is made."""
RUN = "stillhouse.run"
"""Tag of workflow runs and steps: the run they belong to."""
MAX_NAME_CHARACTERS = 250
MAX_PARAM_CHARACTERS = 6000
MAX_TAG_CHARACTERS = 8000
"""MLflow 3.17's limits (`mlflow.utils.validation`); longer values would be cut there with a warning each."""
SHORT_FINGERPRINT = 12
_MEANINGS = {"commit": "mlflow.source.git.commit", "user": "mlflow.user", "command": "mlflow.source.name"}
"""Tags of a run that MLflow's own columns show too."""

MetricPoint = tuple[str, float, int, int]
"""(metric name, value, step, at_ms)."""


@dataclass(slots=True)
class Row:
    """One MLflow run of a workflow run or a step, as far as the records at hand tell."""

    key: str
    run: str
    parent: str | None = None
    """Key of the MLflow run that it is shown under."""
    name: str = ""
    opened_ms: int | None = None
    """None where an earlier batch opened it."""
    tags: dict[str, str] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)
    points: list[MetricPoint] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)
    """Small artifacts, by their path."""
    files: tuple[str, ...] = ()
    """URIs of files that become artifacts."""
    closed: tuple[RunStatus, int] | None = None
    num_records: int = 0


Entry = Row | CandidateFound | VerdictReached


def coalesce(records: Iterable[RunEvent]) -> list[Entry]:
    """Return what to tell MLflow, in order; all records of one step's attempt become one row."""
    entries: list[Entry] = []
    steps: dict[str, Row] = {}
    for record in records:
        match record:
            case RunOpened():
                entries.append(_opened(record))
            case RunClosed():
                entries.append(_closed(record))
            case CandidateFound() | VerdictReached():
                entries.append(record)
            case StepOpened() | CurvePoints() | StepClosed():
                key = f"{record.run}/{record.step}/{record.attempt}"
                if key not in steps:
                    steps[key] = Row(
                        key=key, run=record.run, parent=record.run, name=_step_name(record.step, record.attempt)
                    )
                    entries.append(steps[key])
                _tell_step(steps[key], record)
    return entries


def candidate_key(scores: str, name: str) -> str:
    """Return the key of a candidate: one for each scores artifact and name."""
    return legal_name(f"{scores}/{name}")


def seen_by(run: str) -> str:
    """Return the tag that a candidate bears for each run that has it."""
    return legal_name(f"{RUN}.{run}")


def legal_name(name: str) -> str:
    """Return a name in MLflow's characters that does not resolve to another one as a path."""
    plain = re.sub(r"[^\w\-. :/]", "_", name).strip("/")
    parts = [part for part in plain.split("/") if part not in ("", ".", "..")]
    return re.sub(r"^\.\.+", "_", "/".join(parts))[:MAX_NAME_CHARACTERS].rstrip("/") or "_"


def legal_params(params: Mapping[str, str]) -> dict[str, str]:
    """Return params that MLflow takes as they are."""
    return {legal_name(name): _cut(value, MAX_PARAM_CHARACTERS) for name, value in params.items()}


def legal_tags(tags: Mapping[str, str]) -> dict[str, str]:
    """Return tags that MLflow takes as they are."""
    return {legal_name(name): _cut(value, MAX_TAG_CHARACTERS) for name, value in tags.items()}


def finite(points: Iterable[MetricPoint]) -> tuple[list[MetricPoint], dict[str, str]]:
    """Split points into those MLflow can show and, for each metric with others, a tag that says so."""
    good: list[MetricPoint] = []
    odd: dict[str, str] = {}
    for name, value, step, at_ms in points:
        name, value = legal_name(name), float(value)
        if math.isfinite(value):
            good.append((name, value, step, at_ms))
        else:
            odd[f"not_finite.{name}"[:MAX_NAME_CHARACTERS]] = str(value)
    return good, odd


def _cut(value: object, limit: int) -> str:
    text = str(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _step_name(step: str, attempt: int) -> str:
    return step if attempt <= 1 else f"{step} (attempt {attempt})"


def _opened(record: RunOpened) -> Row:
    meant = {_MEANINGS[name]: value for name, value in record.tags.items() if name in _MEANINGS}
    tags = {**record.tags, **meant, "kind": "workflow", "workflow": record.workflow, RUN: record.run}
    if "command" in record.tags:
        tags["mlflow.source.type"] = "LOCAL"
    return Row(
        key=record.run,
        run=record.run,
        name=record.run,
        opened_ms=record.at_ms,
        tags=legal_tags(tags),
        params=legal_params(record.params),
        num_records=1,
    )


def _closed(record: RunClosed) -> Row:
    tags = legal_tags({"mlflow.note.content": record.note})
    return Row(
        key=record.run,
        run=record.run,
        tags=tags,
        files=record.files,
        closed=(record.status, record.at_ms),
        num_records=1,
    )


def _tell_step(row: Row, record: StepOpened | CurvePoints | StepClosed) -> None:
    row.num_records += 1
    if isinstance(record, StepOpened):
        own = {
            "kind": "step",
            "stage": record.stage,
            "step": record.step,
            "attempt": str(record.attempt),
            "cache": record.cache,
        }
        own |= {"fingerprint": record.fingerprint[:SHORT_FINGERPRINT], RUN: record.run}
        row.opened_ms = record.at_ms
        row.tags |= legal_tags({**record.tags, **own})
        return
    points: Sequence[MetricPoint] = (
        record.points
        if isinstance(record, CurvePoints)
        else [(k, v, 0, record.at_ms) for k, v in record.metrics.items()]
    )
    good, odd = finite(points)
    row.points += good
    row.tags |= odd
    if isinstance(record, StepClosed):
        row.tags |= legal_tags(record.tags)
        row.params |= legal_params(record.params)
        row.closed = (record.status, record.at_ms)
        if record.config:
            row.texts["config.json"] = record.config
