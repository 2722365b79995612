"""A run as MLflow shall show it, folded from its events: rows, candidates and registrations. Pure.

Promises: the same events give the same view, and more events the same and more; it holds only what MLflow accepts
(allowed characters, lengths, finite metrics), and every part has a key that is the same at each fold.
Does not: import MLflow, or know what MLflow has already.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Literal

from workflows.engine.events import (
    AttemptEnded,
    AttemptStarted,
    CandidateFound,
    CurvePoints,
    RunEnded,
    RunEvent,
    RunStarted,
    RunStatus,
    VerdictReached,
)

__all__ = ["KEY", "RUN", "CandidateEntry", "Registration", "Row", "RunView", "fold", "legal_name"]

KEY = "stillhouse.key"
"""Tag that says which MLflow run is meant; it is searched before one is made."""
RUN = "stillhouse.run"
"""Tag of workflow runs and steps: the run they belong to. `stillhouse.run.<run>`: a candidate that this run has."""
MAX_NAME_CHARACTERS = 250
MAX_PARAM_CHARACTERS = 6000
MAX_TAG_CHARACTERS = 8000
"""MLflow 3.17's limits (`mlflow.utils.validation`); longer values would be cut there with a warning each."""
SHORT_FINGERPRINT = 12

MetricPoint = tuple[str, float, int, int]
"""(metric name, value, step, at_ms)."""


class _Entry:
    @cached_property
    def digest(self) -> str:
        """Return what changes when anything of it does; of points, which only grow, their number counts."""
        fields = {name: len(value) if name == "points" else value for name, value in vars(self).items()}
        text = json.dumps(fields, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Row(_Entry):
    """One MLflow run: the workflow run, or an attempt at a step."""

    key: str
    parent: str | None
    """Key of the row that it is shown under."""
    name: str
    started_ms: int
    tags: dict[str, str]
    params: dict[str, str]
    points: list[MetricPoint] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)
    """Small artifacts: path → what it says."""
    files: dict[str, str] = field(default_factory=dict)
    """Path → URI of a file that becomes an artifact."""
    status: Literal["RUNNING", RunStatus] = "RUNNING"
    ended_ms: int | None = None


@dataclass(frozen=True)
class CandidateEntry(_Entry):
    """The flat MLflow run and the logged model of a candidate, which all runs that have it share."""

    key: str
    name: str
    at_ms: int
    params: dict[str, str]
    tags: dict[str, str]
    metrics: dict[str, float]


@dataclass(frozen=True)
class Registration(_Entry):
    """What a verdict asks of the registry: a candidate becomes a model's version and champion."""

    key: str
    registered_name: str
    candidate: str
    """Key of the candidate."""
    name: str
    at_ms: int


@dataclass(frozen=True)
class RunView:
    """The whole run."""

    run: str
    experiment: str
    rows: tuple[Row, ...]
    """The workflow run's first."""
    candidates: tuple[CandidateEntry, ...]
    registrations: tuple[Registration, ...]


def fold(events: Sequence[RunEvent], *, over: bool = False) -> RunView:
    """Return the view of a run.

    Args:
        events: the run's, in order.
        over: no more will come: where they do not say how the run ended, its driver died, and it was killed.

    Raises:
        ValueError: they do not say how the run began.
    """
    first = events[0] if events else None
    if not isinstance(first, RunStarted):
        raise ValueError("the events do not say how the run began")
    top, ended, last_ms = _run_row(first), over, first.at_ms
    steps: dict[str, Row] = {}
    candidates: dict[str, CandidateEntry] = {}
    registrations: dict[str, Registration] = {}
    for event in events[1:]:
        match event:
            case AttemptStarted():
                steps[_step_key(first, event)] = _step_row(first, event)
            case CurvePoints() | AttemptEnded():
                _extend(steps, _step_key(first, event), event)
            case CandidateFound():
                candidates[f"{event.scores}/{event.name}"] = _candidate(first, event)
            case VerdictReached():
                top.tags.update(_legal_tags(_verdict_tags(event)))
                if event.champion is not None:
                    registrations[event.registered_name] = _registration(event, event.champion)
            case RunEnded():
                top.tags.update(_legal_tags({"mlflow.note.content": event.note}))
                top = replace(top, files=_by_path(event.files), status=event.status, ended_ms=event.at_ms)
                ended = True
        last_ms = max([last_ms, *_times(event)])
    rows = [top, *steps.values()]
    if ended:
        killed_ms = top.ended_ms or last_ms
        rows = [row if row.ended_ms else replace(row, status="KILLED", ended_ms=killed_ms) for row in rows]
    return RunView(first.run, first.experiment, tuple(rows), tuple(candidates.values()), tuple(registrations.values()))


def _run_row(event: RunStarted) -> Row:
    tags = {name: getattr(event, name) for name in ("workflow", "command", "commit", "user", "store")}
    tags |= {"kind": "workflow", RUN: event.run, "mlflow.source.type": "LOCAL", "mlflow.source.name": event.command}
    tags |= {"mlflow.source.git.commit": event.commit, "mlflow.user": event.user}  # MLflow's own columns
    return Row(event.run, None, event.run, event.at_ms, _legal_tags(tags), _legal_params(event.params))


def _by_path(uris: Sequence[str]) -> dict[str, str]:
    """Return files by their names; one whose name is taken, as another report's, gets a folder."""
    paths: dict[str, str] = {}
    for uri in uris:
        name = uri.rpartition("/")[2]
        paths[f"{len(paths)}/{name}" if name in paths else name] = uri
    return paths


def _step_key(run: RunStarted, event: AttemptStarted | CurvePoints | AttemptEnded) -> str:
    return f"{run.run}/{event.step}/{event.attempt}"


def _step_row(run: RunStarted, event: AttemptStarted) -> Row:
    tags = {"kind": "step", RUN: run.run, "stage": event.stage, "step": event.step, "attempt": str(event.attempt)}
    tags |= {"cache": event.cache, "fingerprint": event.fingerprint[:SHORT_FINGERPRINT]}
    name = event.step if event.attempt <= 1 else f"{event.step} (attempt {event.attempt})"
    row = Row(_step_key(run, event), run.run, name, event.at_ms, _legal_tags(tags), _legal_params(event.params))
    return replace(row, texts={"config.json": event.config})


def _extend(steps: dict[str, Row], key: str, event: CurvePoints | AttemptEnded) -> None:
    row = steps.get(key)
    if row is None:  # the batch in which it began is lost
        return
    found: Iterable[MetricPoint]
    if isinstance(event, CurvePoints):
        found = event.points
    else:
        found = [(name, value, 0, event.at_ms) for name, value in event.metrics.items()]
        row.tags.update(_legal_tags(event.tags))
        steps[key] = replace(row, status=event.status, ended_ms=event.at_ms)
    for name, value, step, at_ms in found:
        if math.isfinite(value):
            row.points.append((legal_name(name), value, step, at_ms))
        else:
            row.tags.update(_not_finite(name, value))


def _candidate(run: RunStarted, event: CandidateFound) -> CandidateEntry:
    tags = {"kind": "candidate", "candidate": event.name, "workflow": run.workflow, "scores": event.scores}
    tags |= {"artifact": event.artifact, "run": run.run, f"{RUN}.{run.run}": "yes"}
    tags |= {"stillhouse.seen_ms": str(event.at_ms)}
    tags["mlflow.note.content"] = (
        f"Candidate **{event.name}**, judged by scores `{event.scores[:SHORT_FINGERPRINT]}`. Load it with\n\n"
        f'    AutoModelForCausalLM.from_pretrained("{event.artifact}")'
    )
    tags = _legal_tags({**event.tags, **tags})
    metrics = {legal_name(name): value for name, value in event.metrics.items() if math.isfinite(value)}
    for name, value in event.metrics.items():
        tags |= {} if math.isfinite(value) else _not_finite(name, value)
    key = legal_name(f"{event.scores}/{event.name}")
    return CandidateEntry(key, event.name, event.at_ms, _legal_params(event.params), tags, metrics)


def _verdict_tags(event: VerdictReached) -> dict[str, str]:
    verdict = f"champion: {event.champion}" if event.champion is not None else event.outcome
    warnings = {"verdict.warnings": "\n".join(event.warnings)} if event.warnings else {}
    return {"verdict": verdict, "verdict.reasons": "\n".join(event.reasons), **warnings}


def _registration(event: VerdictReached, champion: str) -> Registration:
    name, key = re.sub(r"[/:]", "-", event.registered_name), legal_name(f"{event.scores}/{champion}")
    return Registration(f"registered/{name}", name, key, champion, event.at_ms)


# MLflow's limits ------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def legal_name(name: str) -> str:
    """Return a name in MLflow's characters that does not resolve to another one as a path."""
    plain = re.sub(r"[^\w\-. :/]", "_", name).strip("/")
    parts = [part for part in plain.split("/") if part not in ("", ".", "..")]
    return re.sub(r"^\.\.+", "_", "/".join(parts))[:MAX_NAME_CHARACTERS].rstrip("/") or "_"


def _legal_params(params: Mapping[str, str]) -> dict[str, str]:
    return {legal_name(name): _cut(value, MAX_PARAM_CHARACTERS) for name, value in params.items()}


def _legal_tags(tags: Mapping[str, str]) -> dict[str, str]:
    return {legal_name(name): _cut(value, MAX_TAG_CHARACTERS) for name, value in tags.items()}


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _not_finite(metric: str, value: float) -> dict[str, str]:
    """Return the tag that stands for a value that MLflow cannot show."""
    return {f"not_finite.{legal_name(metric)}"[:MAX_NAME_CHARACTERS]: str(value)}


def _times(event: RunEvent) -> list[int]:
    return [point[3] for point in event.points] if isinstance(event, CurvePoints) else [event.at_ms]
