"""The ledger: tells MLflow what ran and what came out. The only file that imports mlflow, and it does so late.

About every second the records at hand are journaled, then told to MLflow by a process of the ledger's own, then marked
as sent.
Promises: `record` neither blocks nor raises; whatever is journaled reaches MLflow exactly once, whenever driver or
server die: each MLflow run bears a key that is searched before it is made, and points are told again with their first
time. While MLflow is down work goes on, and the journal waits. Does not: decide anything; the verdict is the stage's.
"""

import json
import logging
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from stages.errors import ConfigError
from stages.storage import Folder, cache_root
from workflows.engine.books import CANDIDATES_PATH, Books, Connection
from workflows.engine.entries import RUN, Point
from workflows.engine.heartbeat import Liveness
from workflows.engine.journal import Journal, unfinished
from workflows.engine.masking import masked
from workflows.engine.records import Record
from workflows.engine.sender import Sender, follow
from workflows.engine.tracking import (
    LedgerUnavailable,
    check_tracking_uri,
    default_tracking_uri,
    is_server,
    prepare_tracking,
    sqlite_path,
)
from workflows.engine.turns import Terms, holder_of

__all__ = [
    "CANDIDATES_PATH",
    "Ledger",
    "LedgerState",
    "LedgerUnavailable",
    "check_tracking_uri",
    "connect",
    "default_tracking_uri",
    "prepare_tracking",
    "read_candidates",
    "registered_fingerprints",
    "replay",
]

logger = logging.getLogger(__name__)

FLUSH_SECONDS = 1.0
"""How long records gather before they are journaled together."""
MAX_METRICS, MAX_OTHERS = 800, 100
"""Metrics, and params or tags, in one `log_batch`: the server takes 1000, 100 and 1000 in all."""
SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
}
"""MLflow's environment: no calls home, no URLs printed (each costs a request), and no request for its 120 s."""

Connect = Callable[[str, str], Connection]
_connecting = threading.Lock()


@dataclass(frozen=True, slots=True)
class LedgerState:
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


class Mlflow:
    """A connection to MLflow."""

    def __init__(self, client: Any, uri: str, artifact_root: str) -> None:
        """Wrap an `MlflowClient`."""
        self.client, self.uri = client, uri
        self.artifact_location = None if is_server(uri) else artifact_root

    def log(
        self,
        run_id: str,
        *,
        points: Iterable[Point] = (),
        params: Mapping[str, str],
        tags: Mapping[str, str],
        model_id: str | None = None,
    ) -> None:
        """Write points, params and tags of an MLflow run, in as few requests as MLflow's limits allow."""
        from mlflow.entities import Metric, Param, RunTag

        metrics = [Metric(name, value, at_ms, step, model_id=model_id) for name, value, step, at_ms in points]
        others: list[Any] = [Param(*item) for item in params.items()] + [RunTag(*item) for item in tags.items()]
        while metrics or others:
            now, others = others[:MAX_OTHERS], others[MAX_OTHERS:]
            self.client.log_batch(
                run_id,
                metrics=metrics[:MAX_METRICS],
                params=[item for item in now if isinstance(item, Param)],
                tags=[item for item in now if isinstance(item, RunTag)],
            )
            metrics = metrics[MAX_METRICS:]

    def link(self, run_id: str, model_id: str) -> None:
        """Make a logged model an output of an MLflow run."""
        from mlflow.entities import LoggedModelOutput

        self.client.log_outputs(run_id, [LoggedModelOutput(model_id, step=0)])

    def point_globals(self) -> None:
        """Set MLflow's global URIs: its client falls back on them in places, and would write to the current folder."""
        import mlflow

        before = os.environ.get("MLFLOW_TRACKING_URI")
        mlflow.set_tracking_uri(self.uri)
        mlflow.set_registry_uri(self.uri)
        if before is None:  # it sets the variable too, which would follow us into workers and later runs
            os.environ.pop("MLFLOW_TRACKING_URI", None)
        else:
            os.environ["MLFLOW_TRACKING_URI"] = before


def connect(tracking_uri: str, artifact_root: str) -> Connection:
    """Connect to MLflow; imports it (2 s) and makes a new sqlite ledger.

    Raises:
        ConfigError: the URI is none that the ledger can use.
        LedgerUnavailable: nothing listens there.
    """
    check_tracking_uri(tracking_uri)
    with _connecting:
        for name, value in SETTINGS.items():
            os.environ.setdefault(name, value)
        # MLflow would repeat a POST whose answer was lost and so make a second run; we look for the first one instead.
        os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
        import mlflow

        if sqlite_path(tracking_uri) is not None:
            _sync_less()
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.ERROR)
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # it logs a trace of what it raises to us
        prepare_tracking(tracking_uri, _empty_database)
        connection = Mlflow(mlflow.MlflowClient(tracking_uri, tracking_uri), tracking_uri, artifact_root)
        connection.point_globals()
        return connection


@cache
def _sync_less() -> None:
    """Have sqlite wait for the disk at checkpoints only, safe with a write-ahead log: spares 2.8 ms a commit, 6 a step.

    A power cut may then lose MLflow's last entries (the store's small objects are not synced either), a crash may not.
    """
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    @event.listens_for(Engine, "connect")
    def _(database: Any, _: Any) -> None:
        if isinstance(database, sqlite3.Connection):
            (mode,) = database.execute("PRAGMA journal_mode").fetchone()
            if mode == "wal":
                database.execute("PRAGMA synchronous=NORMAL")


def _empty_database() -> Path:
    """Return a sqlite file with MLflow's tables, made once a version of MLflow: its migrations take 1.4 s."""
    import mlflow

    path = cache_root() / "mlflow" / f"tables-{mlflow.__version__}.db"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder, "made.db")
            mlflow.MlflowClient(f"sqlite:///{made}")  # keeps it open: only a copy may become the file of that name
            os.replace(shutil.copyfile(made, Path(folder, "copy.db")), path)
    return path


class Ledger:
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
        self._inbox: deque[Record] = deque()
        self._journaled = self._sent = self._refused = 0
        self._error: str | None = None
        self._given_up = False
        try:
            check_tracking_uri(tracking_uri)
        except LedgerUnavailable as error:
            self._degrade(str(error))
        self._journal = Journal(runs / run / "ledger")
        self._child = _start_child(tracking_uri, artifact_root, runs, run)
        self._term = self._journal.sender.take(holder_of(run, self._child.pid), Liveness(runs))
        self._journaling = threading.Lock()
        self._closing = threading.Event()
        self._listener = threading.Thread(target=self._listen, name="ledger-answers", daemon=True)
        self._listener.start()
        threading.Thread(target=self._loop, name="ledger", daemon=True).start()

    @property
    def state(self) -> LedgerState:
        """Return how far the ledger is."""
        waiting = len(self._inbox) + self._journaled - self._sent - self._refused
        return LedgerState(self._sent, waiting, self._refused, self._error)

    def record(self, record: Record) -> None:
        """Take a record. Never blocks, never raises."""
        self._inbox.append(record)

    def close(self, timeout_seconds: float) -> LedgerState:
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
            if self._term is not None:
                with suppress(Exception):  # `replay` finds out by itself
                    self._journal.sender.let_go(self._term)
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
                logger.info("the ledger at %s is written again", masked(self._uri))
        code = self._child.wait()
        if code and not self._given_up:
            self._degrade(f"the ledger's process ended with {code}: {words}")

    def _degrade(self, reason: str) -> None:
        if self._error is None:
            shown = masked(self._uri), masked(reason)
            logger.warning("MLflow at %s cannot be written (%s); work goes on, and the journal keeps it", *shown)
        self._error = masked(reason)


def _start_child(tracking_uri: str, artifact_root: str, runs: Folder, run: str) -> "subprocess.Popen[str]":
    """Start this module as the process that tells MLflow what is journaled."""
    return subprocess.Popen(
        [sys.executable, "-m", "workflows.engine.ledger", tracking_uri, artifact_root, runs.uri, run],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path or "." for path in sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # Ctrl-C is for the driver: it closes the ledger once all is told
    )


def replay(runs: Folder, *, tracking_uri: str, artifact_root: str, connect: Connect = connect) -> int:
    """Send the journals of earlier runs that MLflow does not have wholly, and end what dead runs left RUNNING.

    Journals that a living process sends are left to it. Where MLflow cannot be reached they wait on, with one warning.

    Args:
        runs: the store's folder of runs.
        tracking_uri: MLflow's, absolute.
        artifact_root: where MLflow's artifacts lie where no server keeps them.
        connect: connects to a tracking URI with an artifact root.

    Returns:
        How many records were sent.

    Raises:
        ConfigError: the tracking URI is none that the ledger can use.
    """
    connection: Connection | None = None
    num_sent = 0

    def books() -> Books:
        nonlocal connection
        connection = connection or connect(tracking_uri, artifact_root)
        return Books(connection, careful=True)

    for run, journal in unfinished(runs):
        numbers = journal.numbers()
        term = journal.sender.take(holder_of(run, os.getpid()), Liveness(runs)) if numbers else None
        if term is None:
            continue
        sender, sent = Sender(run, journal, books, _turn_of(runs, run)), journal.sent()
        try:
            sender.add(number for number in numbers if number > sent)
            sender.send()
            sender.finish()
        except ConfigError:
            raise
        except Exception as error:  # noqa: BLE001  MLflow must not keep a run from starting
            shown = masked(tracking_uri), masked(str(error))
            logger.warning("MLflow at %s cannot be written (%s); journals of earlier runs wait on", *shown)
            break
        finally:
            num_sent += sender.num_sent
            journal.sender.let_go(term)
    return num_sent


def _ask(tracking_uri: str) -> Any:
    """Return a client for reading; raise `LedgerUnavailable` where there is no ledger."""
    path = sqlite_path(tracking_uri)
    if path is not None and path.is_absolute() and not path.exists():
        raise LedgerUnavailable(
            f"there is no ledger at {path} yet; run a workflow, or pass the tracking URI that its runs use"
        )
    return connect(tracking_uri, "").client


def _pages(search: Callable[[str | None], Any]) -> Iterable[Any]:
    token: str | None = None
    while True:
        page = search(token)
        yield from page
        token = page.token
        if not token:
            return


def read_candidates(
    tracking_uri: str, *, run_ids: Sequence[str] | None = None, experiment: str | None = None
) -> list[dict[str, Any]]:
    """Return the candidates in the ledger, each as plain values, by experiment and name.

    Args:
        tracking_uri: MLflow's.
        run_ids: only candidates that one of these runs has.
        experiment: only those of this experiment.

    Raises:
        LedgerUnavailable: MLflow cannot be asked.
    """
    client = _ask(tracking_uri)
    try:
        experiments = {
            e.experiment_id: e.name for e in _pages(lambda token: client.search_experiments(page_token=token))
        }
        chosen = [key for key, name in experiments.items() if experiment in (None, name)]
        found = (
            []
            if not chosen
            else list(_pages(lambda token: client.search_runs(chosen, "tags.kind = 'candidate'", page_token=token)))
        )
    except Exception as error:
        raise LedgerUnavailable(f"MLflow at {masked(tracking_uri)} cannot be asked ({masked(str(error))})") from error
    rows = [_candidate(run, experiments[run.info.experiment_id]) for run in found]
    wanted = [row for row in rows if run_ids is None or set(run_ids) & set(row["runs"])]
    return sorted(wanted, key=lambda row: (row["experiment"], row["name"], row["at_ms"]))


def _candidate(run: Any, experiment: str) -> dict[str, Any]:
    tags = run.data.tags
    return {
        "name": tags["candidate"],
        "scores": tags["scores"],
        "artifact": tags["artifact"],
        "fingerprint": tags.get("fingerprint"),
        "experiment": experiment,
        "experiment_id": run.info.experiment_id,
        "mlflow_run_id": run.info.run_id,
        "at_ms": run.info.start_time,
        "runs": sorted(name.removeprefix(f"{RUN}.") for name in tags if name.startswith(f"{RUN}.")),
        "params": dict(run.data.params),
        "metrics": dict(run.data.metrics),
        "tags": dict(tags),
    }


def registered_fingerprints(tracking_uri: str) -> set[str]:
    """Return the fingerprints of the models in the registry, and of the scores that they were judged by.

    Raises:
        LedgerUnavailable: the registry cannot be asked; nothing may be collected then.
    """
    client = _ask(tracking_uri)
    try:
        versions = list(_pages(lambda token: client.search_model_versions(max_results=1000, page_token=token)))
    except Exception as error:
        raise LedgerUnavailable(
            f"the registry at {masked(tracking_uri)} cannot be asked ({masked(str(error))})"
        ) from error
    named = {version.tags.get(tag) for version in versions for tag in ("fingerprint", "scores")}
    paths = {part for version in versions for part in re.findall(r"\b[0-9a-f]{64}\b", version.tags.get("artifact", ""))}
    return {fingerprint for fingerprint in named if fingerprint} | paths


class _Passed(logging.Handler):
    """Passes warnings on to the driver, whose log they belong in."""

    def emit(self, record: logging.LogRecord) -> None:
        _answer({"warning": record.getMessage()})


def _answer(value: Mapping[str, Any]) -> None:
    with suppress(OSError):  # a driver that was killed does not listen
        sys.stdout.write(json.dumps(value) + "\n")
        sys.stdout.flush()


def _turn_of(runs: Folder, run: str) -> Callable[[], AbstractContextManager[None]]:
    """Return what makes a process wait for its turn to tell MLflow of what the runs of one store share."""
    terms = Terms(Folder(runs.uri.rpartition("/")[0]) / "mlflow" / "turns")
    return lambda: terms.held(run, Liveness(runs))


def main(tracking_uri: str, artifact_root: str, runs: str, run: str) -> None:
    """Be the process that sends one run's journal as it grows."""
    logging.basicConfig(level=logging.WARNING, handlers=[_Passed()])
    journal, turn = Journal(Folder(runs) / run / "ledger"), _turn_of(Folder(runs), run)
    follow(Sender(run, journal, lambda: Books(connect(tracking_uri, artifact_root)), turn), sys.stdin, _answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
