"""Connects to MLflow and makes a new sqlite database. The only file that imports mlflow (2 s), and it does so late."""

import logging
import os
import shutil
import sqlite3
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit

from stages.storage import Folder, cache_root
from workflows.engine.redaction import redacted
from workflows.engine.tracking.tracking_uri import (
    TrackingUnavailable,
    check_tracking_uri,
    is_on_network,
    is_server,
    sqlite_path,
)
from workflows.engine.tracking.view import MetricPoint

__all__ = ["MAX_METRICS", "Connection", "connect", "is_refusal", "pages", "unless_made_already"]

MAX_METRICS, MAX_OTHERS = 800, 100
"""Metrics, and params or tags, in one `log_batch`: the server takes 1000, 100 and 1000 in all."""
REACHABLE = ("", "file", "s3", "gs", "az")
"""Schemes of artifact URIs that are written without MLflow; a server that keeps them has `mlflow-artifacts:/…`."""
SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
}
"""MLflow's environment: no calls home, no URLs printed (each costs a request), and no request for its 120 s."""
REFUSALS = frozenset(
    {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "MALFORMED_REQUEST", "RESOURCE_DOES_NOT_EXIST", "INVALID_STATE"}
)
"""MLflow's error codes for what it will never take."""
_connecting = threading.Lock()


class Connection:
    """A connection to MLflow."""

    def __init__(self, client: Any, uri: str, artifact_root: str) -> None:
        """Wrap an `MlflowClient`."""
        self.client, self.uri = client, uri
        self.artifact_location = None if is_server(uri) else artifact_root
        """Where artifacts lie where no server keeps them."""

    def log(
        self,
        run_id: str,
        *,
        points: Sequence[MetricPoint],
        params: Mapping[str, str] = MappingProxyType({}),
        tags: Mapping[str, str] = MappingProxyType({}),
        model_id: str | None = None,
    ) -> None:
        """Write `MAX_METRICS` points of an MLflow run, and of its logged model, then params, then tags, at most."""
        from mlflow.entities import Metric, Param, RunTag

        metrics = [Metric(name, value, at_ms, step, model_id=model_id) for name, value, step, at_ms in points]
        others: list[Any] = [Param(*item) for item in params.items()] + [RunTag(*item) for item in tags.items()]
        while metrics or others:
            now, others = others[:MAX_OTHERS], others[MAX_OTHERS:]
            self.client.log_batch(
                run_id,
                metrics=metrics,
                params=[item for item in now if isinstance(item, Param)],
                tags=[item for item in now if isinstance(item, RunTag)],
            )
            metrics = []

    def put(self, run_id: str, artifacts: str, path: str, data: bytes) -> None:
        """Write a small artifact of an MLflow run: to its URI where that is in reach (0.2 ms, not 4)."""
        folder, _, name = path.rpartition("/")
        if urlsplit(artifacts).scheme in REACHABLE:
            Folder.at(artifacts).put(path, data)
            return
        with tempfile.TemporaryDirectory() as temporary:
            Path(temporary, name).write_bytes(data)
            self.client.log_artifact(run_id, f"{temporary}/{name}", folder or None)

    def link(self, run_id: str, model_id: str) -> None:
        """Make a logged model an output of an MLflow run."""
        from mlflow.entities import LoggedModelOutput

        self.client.log_outputs(run_id, [LoggedModelOutput(model_id, step=0)])

    def set_globals(self) -> None:
        """Set MLflow's global URIs: its client falls back on them in places, and would write to the current folder."""
        import mlflow

        variables = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")
        before = {name: os.environ[name] for name in variables if name in os.environ}
        mlflow.set_tracking_uri(self.uri)
        mlflow.set_registry_uri(self.uri)
        for name in variables:  # it sets them too, which would follow us into workers and later runs
            os.environ.pop(name, None)
        os.environ.update(before)


def pages(search: Callable[[str | None], Any]) -> Iterator[Any]:
    """Yield what a search of MLflow's finds, page after page."""
    token: str | None = None
    while True:
        page = search(token)
        yield from page
        token = page.token
        if not token:
            return


@contextmanager
def unless_made_already() -> Iterator[None]:
    """Make something that a run which races us may have made a moment ago."""
    try:
        yield
    except Exception as error:
        if getattr(error, "error_code", "") != "RESOURCE_ALREADY_EXISTS":
            raise


def is_refusal(error: Exception) -> bool:
    """Return whether MLflow, or a flaw in a part, will make the same upsert fail each time."""
    flaws = TypeError | ValueError | LookupError | AttributeError
    return getattr(error, "error_code", None) in REFUSALS or isinstance(error, flaws)


def connect(tracking_uri: str, artifact_root: str) -> Connection:
    """Connect to MLflow; imports it (2 s) and makes a new sqlite database.

    Raises:
        ConfigError: the URI is none that can be used.
        TrackingUnavailable: nothing listens there, or the database cannot be made or opened.
    """
    check_tracking_uri(tracking_uri)
    with _connecting:
        for name, value in SETTINGS.items():
            os.environ.setdefault(name, value)
        # MLflow would repeat a POST whose answer was lost and so make a second run; we look for the first one instead.
        os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
        import mlflow

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.ERROR)
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # it logs a trace of what it raises to us
        path = sqlite_path(tracking_uri)
        if path is not None:
            _sync_less()
            if not path.exists():
                _make_database(path)
        try:
            client = mlflow.MlflowClient(tracking_uri, tracking_uri)
        except Exception as error:  # of SQLAlchemy or MLflow, as a database of a newer version
            raise TrackingUnavailable(
                f"cannot open MLflow at {redacted(tracking_uri)}: {redacted(str(error))}"
            ) from error
        connection = Connection(client, tracking_uri, artifact_root)
        connection.set_globals()
        return connection


@cache
def _sync_less() -> None:
    """Have sqlite wait for the disk at checkpoints only, safe with a write-ahead log: spares 2.8 ms a commit, 6 a step.

    A power cut may then lose MLflow's last entries, which the run's events still have; a crash may not.
    """
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    @event.listens_for(Engine, "connect")
    def _(database: Any, _: Any) -> None:
        if isinstance(database, sqlite3.Connection):
            (mode,) = database.execute("PRAGMA journal_mode").fetchone()
            if mode == "wal":
                database.execute("PRAGMA synchronous=NORMAL")


def _make_database(path: Path) -> None:
    """Make a sqlite file with MLflow's tables: whole or not at all, since MLflow refuses a torn one for ever.

    The tables are made once a version of MLflow, since its migrations take 1.4 s. It has write-ahead logging, which the
    file remembers: a step's three writes took 10.9 ms instead of 15.7 ms, and readers do not block the writer (measured
    2026-11 on two cores with MLflow 3.17).

    Raises:
        TrackingUnavailable: the file cannot be made.
    """
    import mlflow

    tables = cache_root() / "mlflow" / f"tables-{mlflow.__version__}.db"
    try:
        for folder in (tables.parent, path.parent):
            folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".new-") as new:
            copy = Path(new, "copy.db")
            if not tables.exists():
                mlflow.MlflowClient(f"sqlite:///{new}/made.db")  # keeps it open: only a copy may get that name
                with tempfile.TemporaryDirectory(dir=tables.parent) as beside:
                    os.replace(shutil.copyfile(Path(new, "made.db"), Path(beside, "copy.db")), tables)
            shutil.copyfile(tables, copy)
            if not is_on_network(path):
                with closing(sqlite3.connect(copy)) as database:
                    database.execute("PRAGMA journal_mode=WAL")
            with suppress(FileExistsError):  # another run was first
                os.link(copy, path)
    except OSError as error:
        raise TrackingUnavailable(f"cannot make MLflow's database {path} ({error})") from error
