"""What runs inside a step's Ray task: the stage, its log, its report, and the hashing of what it wrote.

Imported by workers; imports no ray itself: the report actor's handle is passed in.
"""

import contextlib
import io
import logging
import math
import os
import resource
import socket
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from stages.contract import Context
from stages.errors import OutOfMemory, StageFailed, StillhouseError, Transient, WorkerLost
from stages.runtime.translation import translate
from workflows.engine.executor import Attempt, AttemptResult, ProgressUpdates
from workflows.engine.failures import Failure, FailureKind
from workflows.engine.provenance import environment
from workflows.engine.redaction import redacted, secrets_of
from workflows.engine.store import Fenced, seal

logger = logging.getLogger(__name__)

PROGRESS_SECONDS = 0.2
"""At most one progress report so often from each process, but for the first and the last."""

KINDS = (
    (OutOfMemory, FailureKind.OUT_OF_MEMORY),
    (Fenced, FailureKind.FENCED),
    (WorkerLost, FailureKind.WORKER_LOST),
    (Transient, FailureKind.TRANSIENT),
    (StillhouseError, FailureKind.PERMANENT),
)


class ProgressCollector:
    """The actor that keeps what stages report until the driver fetches it."""

    def __init__(self) -> None:
        self._kept = ProgressUpdates()

    def add(self, updates: ProgressUpdates) -> None:
        """Keep what an attempt's process reports: of its progress the latest, of all else everything."""
        self._kept.started.update(updates.started)
        self._kept.progress.update(updates.progress)
        for key, points in updates.curves.items():
            self._kept.curves.setdefault(key, []).extend(points)
        self._kept.notes.extend(updates.notes)

    def drain(self) -> ProgressUpdates:
        """Return everything and start anew; what has started is returned each time, since an answer may be lost."""
        kept, self._kept = self._kept, ProgressUpdates(started=set(self._kept.started))
        return kept


class ActorReporter:
    """A `stages.contract.Reporter` that sends to the actor without waiting for it."""

    def __init__(self, collector: Any, step: str, attempt: int) -> None:
        self._collector, self._key = collector, (step, attempt)
        self._last = 0.0

    def started(self) -> None:
        """Report that the work has its resources."""
        self._send(ProgressUpdates(started={self._key}))

    def progress(self, done: float, total: float, unit: str) -> None:
        """Report how much of the work is done."""
        now = time.monotonic()
        if now - self._last >= PROGRESS_SECONDS or done >= total:
            self._last = now
            self._send(ProgressUpdates(progress={self._key: (done, total, unit)}))

    def curve(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add a point to the step's curves."""
        at_ms = int(time.time() * 1000)
        points = [(name, float(value), step, at_ms) for name, value in metrics.items()]
        self._send(ProgressUpdates(curves={self._key: points}))

    def note(self, text: str) -> None:
        """Report one line for people."""
        self._send(ProgressUpdates(notes=[(*self._key, text)]))

    def _send(self, updates: ProgressUpdates) -> None:
        with contextlib.suppress(Exception):  # a report that is lost must not fail the work that it is about
            self._collector.add.remote(updates)


def run_attempt(attempt: Attempt, collector: Any) -> AttemptResult | Failure:
    """Run one attempt at a step and say how it ended; nothing is committed here."""
    reporter = ActorReporter(collector, attempt.step, attempt.attempt)
    with _log(attempt) as log:
        started = time.monotonic()
        logger.info("%s attempt %d on %s: %r", attempt.step, attempt.attempt, socket.gethostname(), attempt.stage)
        context = Context(attempt.fingerprint, attempt.inputs, attempt.out, attempt.resume, attempt.resources, reporter)
        if not attempt.stage.PLACES_WORKERS:
            reporter.started()
        try:
            outcome = attempt.stage.run(context)
            metrics = _checked(outcome.metrics)
            files = seal(attempt.out, attempt.resume)
        except Exception as error:  # noqa: BLE001  the border of the step's process: every error becomes a decision of the engine
            log.write(traceback.format_exc())
            return classify(error)
        seconds, size = time.monotonic() - started, sum(file.size_bytes for file in files)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        text = "%s done in %.1f s: %d files, %d bytes, peak memory %d bytes"
        logger.info(text, attempt.step, seconds, len(files), size, peak)
    return AttemptResult(files, metrics, seconds, peak, environment())


def _checked(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return final metrics as plain numbers, NumPy's too; neither a manifest nor a comparison can hold NaN."""
    found = {}
    for name, value in metrics.items():
        with contextlib.suppress(TypeError, ValueError):
            found[name] = float(value)
        if not math.isfinite(found.get(name, math.nan)):
            text = f"its metric {name!r} is {value!r}, expected a finite number; leave it out if there is none"
            raise StageFailed(text)
    return found


class FreshWorker:
    """An actor whose one attempt has the process to itself.

    An actor rather than a task with `max_calls=1`: it is as fast to start (550 to 650 ms each, 15 at once on two busy
    cores, Ray 2.60), and such a task was now and then given to a worker that was just leaving, and lost.
    """

    def run(self, attempt: Attempt, collector: Any) -> AttemptResult | Failure:
        """Run it."""
        return run_attempt(attempt, collector)


def classify(error: BaseException) -> Failure:
    """Return what kind of failure an error means, by it and everything that it wraps."""
    ours = translate(error)
    rows = ours.micro_batch if isinstance(ours, OutOfMemory) else None
    return Failure(next(kind for of, kind in KINDS if isinstance(ours, of)), str(ours), micro_batch=rows)


class _RedactedLog(io.TextIOWrapper):
    """A text file in which no secret is kept: a tracking URI's password comes by in log records and tracebacks."""

    def __init__(self, path: Path) -> None:
        super().__init__(path.open("ab"), encoding="utf-8", line_buffering=True)
        self._secrets = secrets_of(os.environ)

    def write(self, text: str) -> int:
        return super().write(redacted(text, self._secrets))


@contextlib.contextmanager
def _log(attempt: Attempt) -> Iterator[TextIO]:
    """Send the process's Python output and log records to the attempt's log file in the store, secrets redacted."""
    name, local, root = f"{attempt.step}.{attempt.attempt}.log", attempt.logs.local_path(), logging.getLogger()
    with tempfile.TemporaryDirectory(prefix="stillhouse-log-") as scratch:
        path = (local or Path(scratch)) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with _RedactedLog(path) as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            handler, level = logging.StreamHandler(log), root.level
            handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
            root.addHandler(handler)
            root.setLevel(logging.INFO)
            try:
                yield log
            finally:
                root.removeHandler(handler)
                root.setLevel(level)
                if local is None:
                    log.flush()
                    with contextlib.suppress(Exception):  # must not hide how the attempt ended
                        attempt.logs.upload(path, name)
