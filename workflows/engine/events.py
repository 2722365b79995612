"""What happened in one run: typed, frozen events, kept in the store in create-only batches.

    <store>/runs/<run>/events/000001.json   a batch of events, secrets already redacted

Promises: a batch is whole or absent, and stays as it is; batches are numbered without gaps, and an event stands in one,
also where the answer to a write was lost. Times are milliseconds since the epoch.
Does not: know MLflow, or who reads the events. Batches may hold NaN and infinities as Python's `json` writes them.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from stages.storage import AlreadyExists, Folder
from workflows.engine.redaction import redacted_tree

__all__ = ["READS_AT_ONCE", "EventLog", "RunEvent"]

logger = logging.getLogger(__name__)

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]
READS_AT_ONCE = 16
"""Small objects that are read at once: an object store takes some 30 ms for each."""


class _Event(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, ser_json_inf_nan="constants")


class RunStarted(_Event):
    """An execution of a workflow began."""

    type: Literal["run_started"] = "run_started"
    run: str
    workflow: str
    experiment: str
    at_ms: int
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
    at_ms: int
    stage: str
    fingerprint: str
    cache: Literal["hit", "miss"]
    params: Mapping[str, str]
    """The fields of the stage's config that fit a table's cell."""
    config: str
    """The whole config as JSON."""


class CurvePoints(_AttemptEvent):
    """A step's curves grew."""

    type: Literal["curve_points"] = "curve_points"
    points: tuple[tuple[str, float, int, int], ...]
    """(metric name, value, step, at_ms)."""


class AttemptEnded(_AttemptEvent):
    """A step's attempt ended."""

    type: Literal["attempt_ended"] = "attempt_ended"
    at_ms: int
    status: RunStatus
    metrics: Mapping[str, float]
    tags: Mapping[str, str]
    """Where the result lies or who made it, or the error."""


class CandidateFound(_Event):
    """A model that could ship, with the same `final/*` metrics as every other."""

    type: Literal["candidate_found"] = "candidate_found"
    scores: str
    """Fingerprint of the scores that it was judged by: with the name, the candidate's identity over all runs."""
    name: str
    at_ms: int
    artifact: str
    """URI of the folder to load the checkpoint from."""
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    tags: Mapping[str, str]


class VerdictReached(_Event):
    """The gate decided; the registry follows."""

    type: Literal["verdict_reached"] = "verdict_reached"
    scores: str
    registered_name: str
    champion: str | None
    """Name of the accepted candidate, or None."""
    at_ms: int
    reasons: tuple[str, ...]
    outcome: Literal["accepted", "rejected", "unjudged"] = "rejected"
    """Unjudged: the gate has no limit."""
    warnings: tuple[str, ...] = ()


class RunEnded(_Event):
    """An execution of a workflow ended."""

    type: Literal["run_ended"] = "run_ended"
    at_ms: int
    status: RunStatus
    note: str
    """Markdown: what came out and how to reproduce it."""
    files: tuple[str, ...] = ()
    """URIs of small files (leaderboard, figure) that are shown with the run."""


RunEvent = RunStarted | AttemptStarted | CurvePoints | AttemptEnded | CandidateFound | VerdictReached | RunEnded
_BATCH: TypeAdapter[list[RunEvent]] = TypeAdapter(list[Annotated[RunEvent, Field(discriminator="type")]])


class EventLog:
    """The events of one run, in the folder `<store>/runs/<run>/events`."""

    def __init__(self, folder: Folder) -> None:
        """Open the log; nothing is written yet."""
        self._folder = folder
        self._last = 0

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

    def read_from(self, number: int) -> list[list[RunEvent]]:
        """Return the batches from a number on, in order; one that a power cut tore is empty."""
        batches: list[list[RunEvent]] = []
        at_once = 1
        with ThreadPoolExecutor(READS_AT_ONCE) as pool:
            while True:
                first = number + len(batches)
                for batch in pool.map(self._read, range(first, first + at_once)):
                    if batch is None:
                        return batches
                    batches.append(batch)
                at_once = min(2 * at_once, READS_AT_ONCE)  # a reader that follows finds one batch or none

    def has_events(self) -> bool:
        """Return whether there is a batch."""
        return self._folder.has(_name(1))

    def read_ends(self) -> list[RunEvent] | None:
        """Return the events of the first and the last batch: how the run began and ended. None: there is no batch."""
        last = len(self._folder.entries())
        batches = [self._read(number) for number in sorted({1, last})] if last else []
        return [event for batch in batches for event in batch or []] if batches else None

    def read_all(self) -> list[RunEvent]:
        """Return all events, in order."""
        return [event for batch in self.read_from(1) for event in batch]

    def _read(self, number: int) -> list[RunEvent] | None:
        name = _name(number)
        try:
            return _BATCH.validate_json(self._folder.get(name))
        except FileNotFoundError:
            return None
        except ValueError as error:
            logger.warning("%s cannot be read and is left out: %s", self._folder.uri_of(name), error)
            return []


def _name(number: int) -> str:
    return f"{number:06d}.json"
