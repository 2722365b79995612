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

logger = logging.getLogger(__name__)

PUBLISHER = "workflows.engine.tracking.publisher"
"""The module that is the publisher's process; it outlives a driver that was killed."""
FLUSH_SECONDS = 1.0
"""How long events gather before they are written to the store together."""


@dataclass(frozen=True, slots=True)
class TrackerState:
    """What of a run MLflow lacks when the run is over."""

    waiting: int = 0
    """Events of a run that is not wholly in MLflow; a later run's publisher sends those that are in the store."""
    error: str | None = None
    """Why."""


class RunTracker:
    """One run's tracking.

    MLflow's work is done by a process and not by a thread: it is Python, some 12 ms a step after 2 s of imports, and as
    a thread it took the driver's interpreter for that long.
    """

    def __init__(self, *, tracking_uri: str, runs: Folder, run: str, warned: str = "") -> None:
        self._warned = {warned}  # warnings that people have read
        self._folder, self._log = runs / run, EventLog(runs / run / "events")
        self._inbox: deque[RunEvent] = deque()
        self._num_events = 0
        self._error = "the process that publishes them ended"
        self._closing = threading.Event()
        self._child = subprocess.Popen(
            [sys.executable, "-m", PUBLISHER, runs.uri, run],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path or "." for path in sys.path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # Ctrl-C is for the driver, which ends tracking once all is sent
        )
        assert self._child.stdin is not None
        with suppress(OSError):  # it is gone already, which the end of its output shows
            self._child.stdin.write(tracking_uri + "\n")
            self._child.stdin.flush()
        self._listener = threading.Thread(target=self._listen, name="publisher", daemon=True)
        self._writer = threading.Thread(target=self._store_events, name="events", daemon=True)
        self._listener.start()
        self._writer.start()

    def record(self, event: RunEvent) -> None:
        """Take an event. Never blocks, never raises."""
        self._num_events += 1
        self._inbox.append(event)

    def close(self, timeout_seconds: float) -> TrackerState:
        """Store what is at hand, and wait until the publisher has sent all or given up, or the time is over."""
        self._closing.set()
        self._writer.join()
        assert self._child.stdin is not None
        with suppress(OSError):
            self._child.stdin.close()
        self._listener.join(timeout_seconds)
        if self._listener.is_alive():
            self._child.kill()
            self._error = f"MLflow did not take them within {timeout_seconds:g} s"
        if self._inbox:
            logger.warning("%d events of this run could not be stored and are lost", len(self._inbox))
        with suppress(Exception):  # a store that cannot be read now: then nobody knows
            if self._folder.has(PUBLISHED) and not self._inbox:
                return TrackerState()
        if stored := self._num_events - len(self._inbox):
            logger.warning("%d events wait in the store (%s); a later run publishes them", stored, self._error)
        return TrackerState(self._num_events, self._error)

    def _store_events(self) -> None:
        """Store what was taken, each second and a last time; what cannot be stored now is kept until it can."""
        closing = False
        while not closing:
            closing = self._closing.wait(FLUSH_SECONDS)
            batch = list(self._inbox)
            try:
                self._log.append(batch)
            except Exception as error:  # noqa: BLE001  a store that cannot be written now must not end the run
                logger.warning("the run's events cannot be stored (%s); they are kept until they can", error)
            else:
                for _ in batch:
                    self._inbox.popleft()

    def _listen(self) -> None:
        """Log the publisher's warnings, each once; the last other line that it writes is why it gave up, or crashed."""
        assert self._child.stdout is not None
        for line in self._child.stdout:
            try:
                warning = json.loads(line)
            except ValueError:
                self._error = line.strip() or self._error
                continue
            if warning not in self._warned:
                logger.warning("%s", warning)
            self._warned.add(warning)
