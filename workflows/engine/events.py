"""What happened in one run: typed, frozen events, kept in the store in create-only batches.

    <store>/runs/<run>/events/000001.json   a batch of events, secrets already redacted

Promises: a batch is whole or absent, and stays as it is; batches are numbered without gaps, and an event stands in one,
also where the answer to a write was lost. Times are milliseconds since the epoch.
Does not: know MLflow, or who reads the events. Batches may hold NaN and infinities as Python's `json` writes them.
"""

import json
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from stages.formats.report import Report
from stages.storage import AlreadyExists, Folder
from workflows.engine.redaction import redacted_tree
from workflows.engine.retrying import brief

logger = logging.getLogger(__name__)

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]
READS_AT_ONCE = 16
"""Small objects that are read at once: an object store takes some 30 ms for each."""


class _Event(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, ser_json_inf_nan="constants")

    at_ms: int = Field(default_factory=lambda: int(time.time() * 1000))


class RunStarted(_Event):
    """An execution of a workflow began."""

    type: Literal["run_started"] = "run_started"
    run: str
    workflow: str
    experiment: str
    params: Mapping[str, str]
    """Few and short: the workflow's parameters that differ from their defaults."""
    command: str
    """The command line that reproduces the run."""
    commit: str
    user: str
    store: str


class _AttemptEvent(_Event):
    step: str
    attempt: int
    """0 for a step that was found."""


class AttemptStarted(_AttemptEvent):
    """A step's attempt began, or a cached step was found."""

    type: Literal["attempt_started"] = "attempt_started"
    stage: str
    fingerprint: str
    cache: Literal["hit", "miss"]
    config: Mapping[str, Any]
    """The stage's whole config."""


class CurvePoints(_AttemptEvent):
    """A step's curves grew."""

    type: Literal["curve_points"] = "curve_points"
    points: tuple[tuple[str, float, int, int], ...]
    """(metric name, value, step, at_ms)."""


class AttemptEnded(_AttemptEvent):
    """A step's attempt ended."""

    type: Literal["attempt_ended"] = "attempt_ended"
    status: RunStatus
    metrics: Mapping[str, float]
    tags: Mapping[str, str]
    """Where the result lies or who made it, or the error."""


class ReportMade(_Event):
    """A report was made, or found: candidates, and the gate's verdict on them; the registry follows."""

    type: Literal["report_made"] = "report_made"
    scores: str
    """Fingerprint of the scores that they were judged by: with a name, a candidate's identity over all runs."""
    made_by_run: str
    report: Report


class RunEnded(_Event):
    """An execution of a workflow ended."""

    type: Literal["run_ended"] = "run_ended"
    status: RunStatus
    note: str
    """Markdown: what came out and how to reproduce it."""
    files: tuple[str, ...] = ()
    """URIs of small files (leaderboard, figure) that are shown with the run."""


RunEvent = RunStarted | AttemptStarted | CurvePoints | AttemptEnded | ReportMade | RunEnded
_BATCH: TypeAdapter[list[RunEvent]] = TypeAdapter(list[Annotated[RunEvent, Field(discriminator="type")]])


class EventLog:
    """The events of one run, in the folder `<store>/runs/<run>/events`; written or read in order."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._last = 0
        """The number of the batch that was written or read last."""

    def append(self, events: Sequence[RunEvent]) -> int:
        """Write one batch and return its number.

        Raises:
            STORE_ERRORS: the store cannot be written; the batch may be written again.
        """
        batch = [json.dumps(event) for event in redacted_tree(_BATCH.dump_python(list(events), mode="json"))]
        while batch:
            name = _name(self._last + 1)
            try:
                self._folder.put(name, f"[{', '.join(batch)}]".encode(), create=True)
                batch = []
            except AlreadyExists:
                stored = [json.dumps(event) for event in self._folder.find_json(name) or []]  # as text: NaN ≠ NaN
                if stored == batch[: len(stored)]:  # by a put of ours whose answer was lost
                    batch = batch[len(stored) :]
            self._last += 1
        return self._last

    def read_new(self) -> list[RunEvent]:
        """Return the events since the last call, in order."""
        last = self._last
        while self._folder.has(_name(last + 1)):
            last += 1
        events = self._read(map(_name, range(self._last + 1, last + 1)))
        self._last = last
        return events

    def read_all(self) -> list[RunEvent]:
        """Return all events, in order."""
        return self._read(entry.name for entry in self._folder.entries())

    def read_ends(self) -> list[RunEvent] | None:
        """Return the events of the first and the last batch: how the run began and ended. None: there is no batch."""
        names = [entry.name for entry in self._folder.entries()]
        return self._read(sorted({names[0], names[-1]})) if names else None

    def has_events(self) -> bool:
        """Return whether there is a batch."""
        return self._folder.has(_name(1))

    def _read(self, names: Iterable[str]) -> list[RunEvent]:
        """Return the events of some batches; one that a power cut tore, or that was deleted, is left out."""

        def read(name: str) -> list[RunEvent]:
            try:
                return _BATCH.validate_json(self._folder.get(name))
            except (FileNotFoundError, ValueError) as error:
                problem = f"{self._folder.uri_of(name)} cannot be read and is left out"
                logger.warning("%s: torn, or written by another version (%s)", problem, brief(error))
                return []

        with ThreadPoolExecutor(READS_AT_ONCE) as pool:
            return [event for batch in pool.map(read, names) for event in batch]


def _name(number: int) -> str:
    return f"{number:06d}.json"
