"""The driver's side of tracking: takes events, keeps them in the store, and starts the process that publishes them.

Promises: `record` neither blocks nor raises. Events are in the store before MLflow has them; while MLflow is down work
goes on, and they wait. The tracking URI, which may hold a password, stands in no process's arguments.
Does not: decide anything, or import MLflow.
"""

import json
import logging
import os
import subprocess
import sys
import threading
from collections import deque
from contextlib import suppress
from dataclasses import dataclass

from stages.storage import Folder
from workflows.engine.events import EventLog, RunEvent
from workflows.engine.tracking.publisher import PUBLISHED

__all__ = ["PUBLISHER", "RunTracker", "TrackerState"]

logger = logging.getLogger(__name__)

PUBLISHER = "workflows.engine.tracking.publisher"
"""The module that is the publisher's process; it outlives a driver that was killed."""
FLUSH_SECONDS = 1.0
"""How long events gather before they are written to the store together."""


@dataclass(frozen=True, slots=True)
class TrackerState:
    """What of a run MLflow lacks when the run is over."""

    waiting: int
    """Events of a run that is not wholly in MLflow; a later run's publisher sends those that are in the store."""
    error: str | None
    """Why."""


class RunTracker:
    """One run's tracking: takes events from the driver, stores them, and has a process of its own publish them.

    A process and not a thread: MLflow's work is Python, some 12 ms a step after 2 s of imports, and as a
    thread it took the driver's interpreter for that long. It outlives a killed driver until all is sent.
    """

    def __init__(self, *, tracking_uri: str, artifact_root: str, runs: Folder, run: str) -> None:
        """Begin to track a run.

        Args:
            tracking_uri: MLflow's, already checked.
            artifact_root: where MLflow's artifacts lie where no server keeps them.
            runs: the store's folder of runs.
            run: this run's id.
        """
        self._folder, self._log = runs / run, EventLog(runs / run / "events")
        self._inbox: deque[RunEvent] = deque()
        self._num_events = 0
        self._error = "the process that publishes them ended"
        self._flushing = threading.Lock()
        self._closing, self._silent = threading.Event(), threading.Event()
        self._child = _start_publisher(tracking_uri, artifact_root, runs, run)
        threading.Thread(target=self._listen, name="publisher", daemon=True).start()
        threading.Thread(target=self._flush_until_closing, name="events", daemon=True).start()

    def record(self, event: RunEvent) -> None:
        """Take an event. Never blocks, never raises."""
        self._num_events += 1
        self._inbox.append(event)

    def close(self, timeout_seconds: float) -> TrackerState:
        """Store what is at hand, and wait until the publisher has sent all or given up, or the time is over."""
        self._closing.set()
        self._flush()
        assert self._child.stdin is not None
        with suppress(OSError):
            self._child.stdin.close()
        if not self._silent.wait(timeout_seconds):
            self._child.kill()
            self._error = f"MLflow did not take them within {timeout_seconds:g} s"
        if self._inbox:
            logger.warning("%d events of this run could not be stored and are lost", len(self._inbox))
        with suppress(Exception):  # a store that cannot be read now: then nobody knows
            if self._folder.has(PUBLISHED) and not self._inbox:
                return TrackerState(0, None)
        state, stored = TrackerState(self._num_events, self._error), self._num_events - len(self._inbox)
        if stored:
            logger.warning("%d events wait in the store (%s); a later run publishes them", stored, state.error)
        return state

    def _flush_until_closing(self) -> None:
        while not self._closing.wait(FLUSH_SECONDS):
            self._flush()

    def _flush(self) -> None:
        with self._flushing:
            batch = list(self._inbox)
            try:
                self._log.append(batch)
            except Exception as error:  # noqa: BLE001  a store that cannot be written now must not end the run
                logger.warning("the run's events cannot be stored (%s); they are kept until they can", error)
                return
            for _ in batch:
                self._inbox.popleft()

    def _listen(self) -> None:
        """Log the publisher's warnings; the last other line that it writes is why it gave up, or crashed."""
        assert self._child.stdout is not None
        for line in self._child.stdout:
            try:
                logger.warning("%s", json.loads(line))
            except ValueError:
                self._error = line.strip() or self._error
        self._silent.set()
        self._child.wait()


def _start_publisher(tracking_uri: str, artifact_root: str, runs: Folder, run: str) -> "subprocess.Popen[str]":
    """Start the process that publishes a run's events."""
    child = subprocess.Popen(
        [sys.executable, "-m", PUBLISHER, artifact_root, runs.uri, run],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path or "." for path in sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # Ctrl-C is for the driver, which ends tracking once all is sent
    )
    assert child.stdin is not None
    with suppress(OSError):  # it is gone already, which the end of its output shows
        child.stdin.write(tracking_uri + "\n")
        child.stdin.flush()
    return child
