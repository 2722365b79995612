"""The driver's side of the ledger: takes records, journals them, and starts the process that tells MLflow.

About every second the records at hand are journaled, then told to MLflow by a process of the ledger's own (`telling`),
then marked as sent.
Promises: `record` neither blocks nor raises. While MLflow is down work goes on, and the journal waits.
Does not: decide anything; the verdict is the stage's.
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
from workflows.engine.events import RunEvent
from workflows.engine.lease import holder_of
from workflows.engine.redaction import redacted
from workflows.engine.tracking.journal import Journal
from workflows.engine.tracking.tracking_uri import TrackingUnavailable, check_tracking_uri

__all__ = ["TELLER", "RunTracker", "TrackerState"]

logger = logging.getLogger(__name__)

TELLER = "workflows.engine.tracking.publisher"
"""The module that is the ledger's process; it outlives a driver that was killed."""
FLUSH_SECONDS = 1.0
"""How long records gather before they are journaled together."""


@dataclass(frozen=True, slots=True)
class TrackerState:
    """How far the ledger is, in records."""

    sent: int
    waiting: int
    """Journaled, or about to be, and not in MLflow yet."""
    refused: int
    """MLflow will never take them; each was logged."""
    error: str | None
    """Why MLflow, or the journal, cannot be written right now."""

    @property
    def degraded(self) -> bool:
        """Tell whether records wait because something is out of reach."""
        return self.error is not None


class RunTracker:
    """One run's ledger: takes records from the driver, journals them, and has a process of its own tell MLflow.

    A process and not a thread: MLflow's work is Python, some 12 ms a step after 2 s of imports, and as a
    thread it took the driver's interpreter for that long. It outlives a killed driver until all is sent.
    """

    def __init__(self, *, tracking_uri: str, artifact_root: str, runs: Folder, run: str) -> None:
        """Begin a run's journal.

        Args:
            tracking_uri: MLflow's, absolute.
            artifact_root: where MLflow's artifacts lie where no server keeps them.
            runs: the store's folder of runs.
            run: this run's id.

        Raises:
            ConfigError: the tracking URI is none that the ledger can use.
        """
        self._uri = tracking_uri
        self._inbox: deque[RunEvent] = deque()
        self._journaled = self._sent = self._refused = 0
        self._error: str | None = None
        self._given_up = False
        try:
            check_tracking_uri(tracking_uri)
        except TrackingUnavailable as error:
            self._degrade(str(error))
        self._journal = Journal(runs / run / "ledger")
        self._child = _start_child(tracking_uri, artifact_root, runs, run)
        self._term = self._journal.sender.acquire(holder_of(run, self._child.pid))
        self._journaling = threading.Lock()
        self._closing = threading.Event()
        self._listener = threading.Thread(target=self._listen, name="ledger-answers", daemon=True)
        self._listener.start()
        threading.Thread(target=self._loop, name="ledger", daemon=True).start()

    @property
    def state(self) -> TrackerState:
        """Return how far the ledger is."""
        waiting = len(self._inbox) + self._journaled - self._sent - self._refused
        return TrackerState(self._sent, waiting, self._refused, self._error)

    def record(self, record: RunEvent) -> None:
        """Take a record. Never blocks, never raises."""
        self._inbox.append(record)

    def close(self, timeout_seconds: float) -> TrackerState:
        """Journal what is at hand and wait until it is sent; what is not in time waits in the journal for `replay`."""
        self._closing.set()
        self._journal_inbox()
        assert self._child.stdin is not None
        with suppress(OSError):
            self._child.stdin.close()
        try:
            self._child.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            self._given_up = True
            self._child.kill()
        self._listener.join()
        state = self.state
        if state.waiting:
            reason = state.error or f"MLflow did not take them within {timeout_seconds:g} s"
            state = replace(state, error=reason)
            logger.warning("%d records wait in the journal (%s); the next run sends them", state.waiting, reason)
            if isinstance(self._term, int):
                with suppress(Exception):  # `replay` finds out by itself
                    self._journal.sender.release(self._term)
        return state

    def _loop(self) -> None:
        while not self._closing.wait(FLUSH_SECONDS):
            self._journal_inbox()

    def _journal_inbox(self) -> None:
        assert self._child.stdin is not None
        with self._journaling:
            batch = list(self._inbox)
            if not batch:
                return
            try:
                number = self._journal.append(batch)
            except Exception as error:  # noqa: BLE001  a store that cannot be written now must not end the run
                self._degrade(f"the journal cannot be written: {error}")
                return
            self._journaled += len(batch)
            for _ in batch:
                self._inbox.popleft()
            with suppress(OSError, ValueError):  # the process is gone, which its silence tells
                self._child.stdin.write(f"{number}\n")
                self._child.stdin.flush()

    def _listen(self) -> None:
        """Take what the process tells: how far it is, and warnings; anything else is its last words."""
        assert self._child.stdout is not None
        words = ""
        for line in self._child.stdout:
            try:
                told = json.loads(line)
            except ValueError:
                words = line.strip() or words
                continue
            if "warning" in told:
                logger.warning("%s", told["warning"])
                continue
            self._sent, self._refused = told["sent"], told["refused"]
            if told["error"]:
                self._degrade(told["error"])
            elif self._error is not None:
                self._error = None
                logger.info("the ledger at %s is written again", redacted(self._uri))
        code = self._child.wait()
        if code and not self._given_up:
            self._degrade(f"the ledger's process ended with {code}: {words}")

    def _degrade(self, reason: str) -> None:
        if self._error is None:
            shown = redacted(self._uri), redacted(reason)
            logger.warning("MLflow at %s cannot be written (%s); work goes on, and the journal keeps it", *shown)
        self._error = redacted(reason)


def _start_child(tracking_uri: str, artifact_root: str, runs: Folder, run: str) -> "subprocess.Popen[str]":
    """Start the process that tells MLflow what is journaled."""
    return subprocess.Popen(
        [sys.executable, "-m", TELLER, tracking_uri, artifact_root, runs.uri, run],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path or "." for path in sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # Ctrl-C is for the driver: it closes the ledger once all is told
    )
