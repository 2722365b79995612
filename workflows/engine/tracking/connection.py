"""Connects to MLflow and makes a new sqlite ledger. The only file that imports mlflow (2 s), and it does so late."""

import logging
import os
import shutil
import sqlite3
import tempfile
import threading
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from stages.storage import cache_root
from workflows.engine.tracking.tracking_uri import check_tracking_uri, is_server, prepare_tracking, sqlite_path
from workflows.engine.tracking.view import MetricPoint

__all__ = ["Connection", "connect"]

MAX_METRICS, MAX_OTHERS = 800, 100
"""Metrics, and params or tags, in one `log_batch`: the server takes 1000, 100 and 1000 in all."""
SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
}
"""MLflow's environment: no calls home, no URLs printed (each costs a request), and no request for its 120 s."""
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
        points: Iterable[MetricPoint] = (),
        params: Mapping[str, str],
        tags: Mapping[str, str],
        model_id: str | None = None,
    ) -> None:
        """Write points, params and tags of an MLflow run, and the points of its logged model too, in few requests."""
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
        TrackingUnavailable: nothing listens there.
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
        connection = Connection(mlflow.MlflowClient(tracking_uri, tracking_uri), tracking_uri, artifact_root)
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
