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
from dataclasses import dataclass, replace

from stages.storage import Folder
from workflows.engine.events import EventLog, RunEvent
from workflows.engine.redaction import redacted
from workflows.engine.tracking.tracking_uri import TrackingUnavailable, check_tracking_uri

__all__ = ["PUBLISHER", "RunTracker", "TrackerState"]

logger = logging.getLogger(__name__)

PUBLISHER = "workflows.engine.tracking.publisher"
"""The module that is the publisher's process; it outlives a driver that was killed."""
FLUSH_SECONDS = 1.0
"""How long events gather before they are written to the store together."""


@dataclass(frozen=True, slots=True)
class TrackerState:
    """How far tracking is, in events."""

    sent: int
    """MLflow has them, or will never take them, which was logged."""
    waiting: int
    """In the store, or about to be, and not sent yet."""
    error: str | None
    """Why MLflow, or the store, cannot be written right now."""


class RunTracker:
    """One run's tracking: takes events from the driver, stores them, and has a process of its own publish them.

    A process and not a thread: MLflow's work is Python, some 12 ms a step after 2 s of imports, and as a
    thread it took the driver's interpreter for that long. It outlives a killed driver until all is sent.
    """

    def __init__(self, *, tracking_uri: str, artifact_root: str, runs: Folder, run: str) -> None:
        """Begin to track a run.

        Args:
            tracking_uri: MLflow's, absolute.
            artifact_root: where MLflow's artifacts lie where no server keeps them.
            runs: the store's folder of runs.
            run: this run's id.

        Raises:
            ConfigError: the tracking URI is none that can be used.
        """
        self._uri = tracking_uri
        self._inbox: deque[RunEvent] = deque()
        self._stored = self._sent = 0
        self._error: str | None = None
        try:
            check_tracking_uri(tracking_uri)
        except TrackingUnavailable as error:
            self._report(str(error))
        self._log = EventLog(runs / run / "events")
        self._child = _start_publisher(tracking_uri, artifact_root, runs, run)
        self._storing = threading.Lock()
        self._closing, self._final = threading.Event(), threading.Event()
        threading.Thread(target=self._listen, name="publisher-answers", daemon=True).start()
        threading.Thread(target=self._flush_until_closing, name="events", daemon=True).start()

    @property
    def state(self) -> TrackerState:
        """Return how far tracking is."""
        return TrackerState(self._sent, len(self._inbox) + self._stored - self._sent, self._error)

    def record(self, event: RunEvent) -> None:
        """Take an event. Never blocks, never raises."""
        self._inbox.append(event)

    def close(self, timeout_seconds: float) -> TrackerState:
        """Store what is at hand and wait until it is sent; what is not in time waits for a later run's publisher."""
        self._closing.set()
        self._flush()
        assert self._child.stdin is not None
        with suppress(OSError):
            self._child.stdin.close()
        if not self._final.wait(timeout_seconds):
            self._child.kill()
        state = self.state
        if state.waiting:
            reason = state.error or f"MLflow did not take them within {timeout_seconds:g} s"
            state = replace(state, error=reason)
            logger.warning("%d events wait in the store (%s); the next run sends them", state.waiting, reason)
        return state

    def _flush_until_closing(self) -> None:
        while not self._closing.wait(FLUSH_SECONDS):
            self._flush()

    def _flush(self) -> None:
        with self._storing:
            batch = list(self._inbox)
            if not batch:
                return
            try:
                self._log.append(batch)
            except Exception as error:  # noqa: BLE001  a store that cannot be written now must not end the run
                self._report(f"the run's events cannot be stored: {error}")
                return
            self._stored += len(batch)
            for _ in batch:
                self._inbox.popleft()

    def _listen(self) -> None:
        """Take what the publisher answers: how far it is, and warnings; anything else is its last words."""
        assert self._child.stdout is not None
        words = ""
        for line in self._child.stdout:
            try:
                answer = json.loads(line)
            except ValueError:
                words = line.strip() or words
                continue
            if "warning" in answer:
                logger.warning("%s", answer["warning"])
                continue
            self._sent = answer["sent"]
            if answer["error"]:
                self._report(answer["error"])
            elif self._error is not None:
                self._error = None
                logger.info("MLflow at %s is written again", redacted(self._uri))
            if answer["final"]:
                self._final.set()
        code = self._child.wait()
        if code and not self._final.is_set():
            self._report(f"the publisher ended with {code}: {words}")
        self._final.set()

    def _report(self, reason: str) -> None:
        if self._error is None:
            shown = redacted(self._uri), redacted(reason)
            logger.warning("MLflow at %s cannot be written (%s); work goes on, and the store keeps the events", *shown)
        self._error = redacted(reason)


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
    with suppress(OSError):  # it is gone already, which its silence says
        child.stdin.write(tracking_uri + "\n")
        child.stdin.flush()
    return child
