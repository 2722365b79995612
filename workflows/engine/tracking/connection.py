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
from math import ceil
from pathlib import Path
from typing import Any

from stages.storage import cache_root
from workflows.engine.redaction import redacted
from workflows.engine.tracking.tracking_uri import TrackingUnavailable, check_tracking_uri, is_on_network, sqlite_path
from workflows.engine.tracking.view import MetricPoint

MAX_METRICS, MAX_OTHERS = 800, 100
"""Metrics, and params or tags, in one `log_batch`: the server takes 1000, 100 and 1000 in all."""
SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
}
"""MLflow's environment: no calls home, no URLs printed (each costs a request), and no request for its 120 s."""
REFUSALS = ["INVALID_PARAMETER_VALUE", "BAD_REQUEST", "MALFORMED_REQUEST", "RESOURCE_DOES_NOT_EXIST", "INVALID_STATE"]
"""MLflow's error codes for what it will never take."""
_connecting = threading.Lock()


def batches(
    points: Sequence[MetricPoint], params: Mapping[str, str], tags: Mapping[str, str], model_id: str | None = None
) -> Iterator[dict[str, list[Any]]]:
    """Yield the arguments of as many `log_batch` as it takes to write what a run, and its logged model, lacks."""
    from mlflow.entities import Metric, Param, RunTag

    num_batches = max(ceil(len(points) / MAX_METRICS), ceil(max(len(params), len(tags)) / MAX_OTHERS))
    all_params, all_tags = [Param(*item) for item in params.items()], [RunTag(*item) for item in tags.items()]
    for n in range(num_batches):
        others = slice(n * MAX_OTHERS, (n + 1) * MAX_OTHERS)
        now = points[n * MAX_METRICS : (n + 1) * MAX_METRICS]
        metrics = [Metric(name, value, at_ms, step, model_id=model_id) for name, value, step, at_ms in now]
        yield {"metrics": metrics, "params": all_params[others], "tags": all_tags[others]}


def link(client: Any, run_id: str, model_id: str) -> None:
    """Make a logged model an output of an MLflow run."""
    from mlflow.entities import LoggedModelOutput

    client.log_outputs(run_id, [LoggedModelOutput(model_id, step=0)])


def pages(search: Callable[[str | None], Any]) -> Iterator[Any]:
    """Yield what a search of MLflow's finds, page after page."""
    page = search(None)
    yield from page
    while page.token:
        page = search(page.token)
        yield from page


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


def connect(tracking_uri: str) -> Any:
    """Return an `MlflowClient`; imports MLflow (2 s) and makes a new sqlite database.

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
            problem = f"cannot open MLflow at {redacted(tracking_uri)}: {redacted(str(error))}"
            raise TrackingUnavailable(problem) from error
        # Its client falls back on MLflow's global URIs in places: it would write to the current folder, and its sqlite
        # registry look for logged models there. Setting them sets variables that would follow us into other processes.
        variables = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")
        before = {name: os.environ[name] for name in variables if name in os.environ}
        mlflow.set_tracking_uri(tracking_uri)
        mlflow.set_registry_uri(tracking_uri)
        for name in variables:
            os.environ.pop(name, None)
        os.environ.update(before)
        return client


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
