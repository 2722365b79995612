"""A run as MLflow shall show it, folded from its events: a row for each MLflow run. Pure.

Promises: the same events give the same view, and more events the same and more; it holds only what MLflow accepts
(allowed characters, lengths, finite metrics), and every row has a key that is the same at each fold.
Does not: import MLflow, or know what MLflow has already.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

from workflows.engine.events import (
    AttemptEnded,
    AttemptStarted,
    CurvePoints,
    ReportMade,
    RunEnded,
    RunEvent,
    RunStarted,
    RunStatus,
)

KEY = "stillhouse.key"
"""Tag that says which MLflow run is meant; it is searched before one is made."""
RUN = "stillhouse.run"
"""Tag of workflow runs and steps: the run they belong to. `stillhouse.run.<run>`: a candidate that this run has."""
MAX_NAME_CHARACTERS = 250
MAX_PARAM_CHARACTERS = 6000
MAX_TAG_CHARACTERS = 8000
"""MLflow 3.17's limits (`mlflow.utils.validation`); longer values would be cut there with a warning each."""
SHORT_FINGERPRINT = 12
NUM_STEP_PARAMS, STEP_PARAM_CHARACTERS = 12, 60
"""Of a step's config, what fits a table's cell."""

MetricPoint = tuple[str, float, int, int]
"""(metric name, value, step, at_ms)."""


@dataclass
class Row:
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

    def add_points(self, points: Iterable[MetricPoint]) -> None:
        """Add to its metrics; a value that MLflow cannot show becomes a tag."""
        for name, value, step, at_ms in points:
            if math.isfinite(value):
                self.points.append((legal_name(name), value, step, at_ms))
            else:
                self.tags[f"not_finite.{name}"] = str(value)

    def end(self, status: RunStatus, at_ms: int) -> None:
        """End it."""
        self.status, self.ended_ms = status, at_ms


@dataclass
class CandidateRow(Row):
    """A candidate's flat MLflow run and logged model, which all runs that have it share."""

    registered_name: str | None = None
    """The registered model whose version and champion the verdict made of it."""


@dataclass(frozen=True)
class RunView:
    """The whole run."""

    run: str
    experiment: str
    rows: tuple[Row, ...]
    """The workflow run's first."""
    candidates: tuple[CandidateRow, ...]


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
    top = _run_row(first)
    rows, candidates = {top.key: top}, dict[str, CandidateRow]()
    for event in events[1:]:
        match event:
            case AttemptStarted():
                rows[_step_key(first, event)] = _step_row(first, event)
            case CurvePoints() | AttemptEnded():
                _extend(rows.get(_step_key(first, event)), event)
            case ReportMade(report=report):
                verdict = report.verdict
                outcome = verdict.outcome if verdict.champion is None else f"champion: {verdict.champion}"
                top.tags |= {"verdict": outcome, "verdict.reasons": "\n".join(verdict.reasons)}
                if verdict.warnings:
                    top.tags["verdict.warnings"] = "\n".join(verdict.warnings)
                candidates |= {row.key: row for row in _candidates(first, event)}
            case RunEnded():
                top.tags["mlflow.note.content"] = event.note
                top.files = _by_path(event.files)
                top.end(event.status, event.at_ms)
    if over or top.ended_ms is not None:
        killed_ms = top.ended_ms or max(event.at_ms for event in events)
        for row in rows.values():
            if row.ended_ms is None:
                row.end("KILLED", killed_ms)
    for row in (*rows.values(), *candidates.values()):
        row.params, row.tags = _legal(row.params, MAX_PARAM_CHARACTERS), _legal(row.tags, MAX_TAG_CHARACTERS)
    return RunView(first.run, first.experiment, tuple(rows.values()), tuple(candidates.values()))


def _run_row(event: RunStarted) -> Row:
    tags = {name: getattr(event, name) for name in ("workflow", "command", "commit", "user", "store")}
    tags |= {"kind": "workflow", RUN: event.run, "mlflow.source.type": "LOCAL", "mlflow.source.name": event.command}
    tags |= {"mlflow.source.git.commit": event.commit, "mlflow.user": event.user}  # MLflow's own columns
    return Row(legal_name(event.run), None, event.run, event.at_ms, tags, dict(event.params))


def _by_path(uris: Sequence[str]) -> dict[str, str]:
    """Return files by their names; one whose name is taken, as another report's, gets a folder."""
    paths: dict[str, str] = {}
    for uri in uris:
        name = uri.rpartition("/")[2]
        paths[f"{len(paths)}/{name}" if name in paths else name] = uri
    return paths


def _step_key(run: RunStarted, event: AttemptStarted | CurvePoints | AttemptEnded) -> str:
    return legal_name(f"{run.run}/{event.step}/{event.attempt}")


def _step_row(run: RunStarted, event: AttemptStarted) -> Row:
    tags = {"kind": "step", RUN: run.run, "stage": event.stage, "step": event.step, "attempt": str(event.attempt)}
    tags |= {"cache": event.cache, "fingerprint": event.fingerprint[:SHORT_FINGERPRINT]}
    name = event.step if event.attempt <= 1 else f"{event.step} (attempt {event.attempt})"
    plain = [(name, value) for name, value in event.config.items() if isinstance(value, str | int | float)]
    params = {name: str(value)[:STEP_PARAM_CHARACTERS] for name, value in plain[:NUM_STEP_PARAMS]}
    texts = {"config.json": json.dumps(event.config, indent=1)}
    return Row(_step_key(run, event), legal_name(run.run), name, event.at_ms, tags, params, texts=texts)


def _extend(row: Row | None, event: CurvePoints | AttemptEnded) -> None:
    if row is None:  # the batch in which it began is lost
        return
    if isinstance(event, CurvePoints):
        row.add_points(event.points)
    else:
        row.add_points((name, value, 0, event.at_ms) for name, value in event.metrics.items())
        row.tags |= event.tags
        row.end(event.status, event.at_ms)


def _candidates(run: RunStarted, event: ReportMade) -> Iterator[CandidateRow]:
    verdict, at_ms = event.report.verdict, event.at_ms
    for found in event.report.candidates:
        tags = {f"note.{metric}": why for metric, why in found.notes.items()}
        tags |= {"kind": "candidate", "candidate": found.name, "workflow": run.workflow, "scores": event.scores}
        tags |= {"artifact": found.uri, "fingerprint": found.fingerprint, "made_by_run": event.made_by_run}
        tags |= {"run": run.run, f"{RUN}.{run.run}": "yes", "stillhouse.seen_ms": str(at_ms)}
        tags["mlflow.note.content"] = (
            f"Candidate **{found.name}**, judged by scores `{event.scores[:SHORT_FINGERPRINT]}`. Load it with\n\n"
            f'    AutoModelForCausalLM.from_pretrained("{found.uri}")'
        )
        key, params = legal_name(f"{event.scores}/{found.name}"), dict(found.params)
        row = CandidateRow(key, None, found.name, at_ms, tags, params)
        row.add_points((name, value, 0, at_ms) for name, value in found.metrics.items())
        row.end("FINISHED", at_ms)
        if found.name == verdict.champion:
            row.registered_name = re.sub(r"[/:]", "-", verdict.registered_name)
        yield row


@lru_cache(maxsize=4096)
def legal_name(name: str) -> str:
    """Return a name in MLflow's characters that does not resolve to another one as a path."""
    plain = re.sub(r"[^\w\-. :/]", "_", name).strip("/")
    parts = [part for part in plain.split("/") if part not in ("", ".", "..")]
    return re.sub(r"^\.\.+", "_", "/".join(parts))[:MAX_NAME_CHARACTERS].rstrip("/") or "_"


def _legal(values: Mapping[str, str], limit: int) -> dict[str, str]:
    """Return params or tags by legal names, with what is longer than MLflow's limit cut."""
    return {legal_name(name): v if len(v) <= limit else v[: limit - 1] + "…" for name, v in values.items()}
