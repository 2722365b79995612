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
from workflows.engine.store import seal

PROGRESS_SECONDS = 0.2
"""At most one progress report so often from each process, but for the first and the last."""

KINDS = (
    (OutOfMemory, FailureKind.OUT_OF_MEMORY),
    (WorkerLost, FailureKind.WORKER_LOST),
    (Transient, FailureKind.TRANSIENT),
    (StillhouseError, FailureKind.PERMANENT),
)


class ProgressCollector:
    """The actor that keeps what stages report until the driver fetches it."""

    def __init__(self) -> None:
        """Start empty."""
        self._reports = ProgressUpdates()

    def started(self, key: tuple[str, int]) -> None:
        """Keep that an attempt's work has its resources."""
        self._reports.started.add(key)

    def progress(self, key: tuple[str, int], done: float, total: float, unit: str) -> None:
        """Keep an attempt's latest progress."""
        self._reports.progress[key] = (done, total, unit)  # type: ignore[index]

    def curve(self, key: tuple[str, int], points: list[tuple[str, float, int, int]]) -> None:
        """Keep points of an attempt's curves."""
        self._reports.curves.setdefault(key, []).extend(points)  # type: ignore[attr-defined]

    def note(self, key: tuple[str, int], text: str) -> None:
        """Keep a line for people."""
        self._reports.notes.append((*key, text))

    def drain(self) -> ProgressUpdates:
        """Return everything and start anew; what has started is returned each time, since an answer may be lost."""
        reports, self._reports = self._reports, ProgressUpdates(started=set(self._reports.started))
        return reports


class ActorReporter:
    """A `stages.contract.Reporter` that sends to the actor without waiting for it."""

    def __init__(self, box: Any, step: str, attempt: int) -> None:
        """Report for one attempt."""
        self._box, self._key = box, (step, attempt)
        self._last = 0.0

    def started(self) -> None:
        """Report that the work has its resources."""
        self._send("started")

    def progress(self, done: float, total: float, unit: str) -> None:
        """Report how much of the work is done."""
        now = time.monotonic()
        if now - self._last >= PROGRESS_SECONDS or done >= total:
            self._last = now
            self._send("progress", done, total, unit)

    def curve(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add a point to the step's curves."""
        at_ms = int(time.time() * 1000)
        self._send("curve", [(name, float(value), step, at_ms) for name, value in metrics.items()])

    def note(self, text: str) -> None:
        """Report one line for people."""
        self._send("note", text)

    def _send(self, method: str, *values: Any) -> None:
        with contextlib.suppress(Exception):  # a report that is lost must not fail the work that it is about
            getattr(self._box, method).remote(self._key, *values)


def run_attempt(attempt: Attempt, box: Any) -> AttemptResult | Failure:
    """Run one attempt at a step and say how it ended; nothing is committed here."""
    reporter = ActorReporter(box, attempt.step, attempt.attempt)
    with _log(attempt) as log:
        started = time.monotonic()
        logger = logging.getLogger(__name__)
        logger.info("%s attempt %d on %s: %r", attempt.step, attempt.attempt, socket.gethostname(), attempt.stage)
        context = Context(attempt.fingerprint, attempt.inputs, attempt.out, attempt.resume, attempt.resources, reporter)
        if not attempt.stage.PLACES_WORKERS:
            reporter.started()
        try:
            outcome = attempt.stage.run(context)
            metrics = _checked(outcome.metrics)
            files = seal(attempt.out, attempt.resume, attempt.root)
        except Exception as error:  # noqa: BLE001  the border of the step's process: every error becomes a decision of the engine
            log.write(traceback.format_exc())
            return classify(error)
        seconds = time.monotonic() - started
        size = sum(file.size_bytes for file in files)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        logger.info(
            "%s done in %.1f s: %d files, %d bytes, peak memory %d bytes", attempt.step, seconds, len(files), size, peak
        )
    return AttemptResult(files, metrics, outcome.fallbacks, seconds, peak, environment())


def _checked(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return final metrics as plain numbers, NumPy's too.

    Raises:
        StageFailed: one is no finite number, which neither a manifest nor a comparison can hold.
    """
    found = {}
    for name, value in metrics.items():
        try:
            found[name] = float(value)
        except (TypeError, ValueError):
            found[name] = math.nan
        if not math.isfinite(found[name]):
            raise StageFailed(
                f"its metric {name!r} is {value!r}, expected a finite number; leave it out if there is none"
            )
    return found


class FreshWorker:
    """An actor whose one attempt has the process to itself.

    An actor rather than a task with `max_calls=1`: it is as fast to start (550 to 650 ms each, 15 at once on two busy
    cores, Ray 2.60), and such a task was now and then given to a worker that was just leaving, and lost.
    """

    def run(self, attempt: Attempt, box: Any) -> AttemptResult | Failure:
        """Run one attempt."""
        return run_attempt(attempt, box)


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
    name = f"{attempt.step}.{attempt.attempt}.log"
    local = attempt.logs.local_path()
    path = (local or Path(tempfile.mkdtemp(prefix="stillhouse-log-"))) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    root = logging.getLogger()
    with _RedactedLog(path) as log:
        handler = logging.StreamHandler(log)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        level = root.level
        root.addHandler(handler)
        root.setLevel(logging.INFO)
        try:
            with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                yield log
        finally:
            root.removeHandler(handler)
            root.setLevel(level)
            if local is None:
                log.flush()
                with contextlib.suppress(Exception):  # a log that cannot be stored must not hide how the attempt ended
                    attempt.logs.upload(path, name)
                os.unlink(path)
