"""A store and its MLflow as the ledger's tests use them, and what else they share."""

import socket
import time
import urllib.request
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from workflows.engine.tracking.journal import Journal

from stages.storage import Folder
from tests.workflows.engine.tracking.nights import EXPERIMENT
from workflows.engine.events import RunEvent
from workflows.engine.tracking.connection import Connection, connect
from workflows.engine.tracking.publisher import replay
from workflows.engine.tracking.tracker import RunTracker


class Place:
    """A store, and the MLflow that its runs are told to."""

    def __init__(self, folder: Path, uri: str) -> None:
        self.folder, self.uri = folder, uri
        self.runs = Folder.at(folder / "runs")
        self.root = str(folder / "mlflow/artifacts")

    @cached_property
    def client(self) -> Any:
        return connect(self.uri, self.root).client

    def ledger(self, run: str, uri: str | None = None) -> RunTracker:
        return RunTracker(tracking_uri=uri or self.uri, artifact_root=self.root, runs=self.runs, run=run)

    def journal(self, run: str, *batches: Sequence[RunEvent]) -> Journal:
        journal = Journal(self.runs / run / "ledger")
        for batch in batches:
            journal.append(batch)
        return journal

    def replay(self, connecting: Callable[[str, str], Connection] = connect) -> int:
        return replay(self.runs, tracking_uri=self.uri, artifact_root=self.root, connect=connecting)

    def tell(self, run: str, records: Sequence[RunEvent]) -> int:
        self.journal(run, records)
        return self.replay()

    def mlflow_runs(self, where: str = "") -> list[Any]:
        client = self.client
        experiment = client.get_experiment_by_name(EXPERIMENT)
        return list(client.search_runs([experiment.experiment_id], where, order_by=["attributes.start_time"]))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(url: str) -> bool:
    try:
        return urllib.request.urlopen(url, timeout=2).status == 200  # type: ignore[no-any-return]
    except OSError:
        return False


def wait_until(reached: Callable[[], bool], timeout_seconds: float) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not reached():
        assert time.monotonic() < deadline, f"not reached in {timeout_seconds} s"
        time.sleep(0.1)


def by_name(runs: Sequence[Any]) -> dict[str, Any]:
    return {run.info.run_name: run for run in runs}


def as_fields(record: Any) -> dict[str, Any]:
    return {name: getattr(record, name) for name in type(record).__dataclass_fields__}
