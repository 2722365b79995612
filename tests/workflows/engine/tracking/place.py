"""A store and its MLflow as the tests of tracking use them, and what else they share."""

import socket
import time
import urllib.request
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from stages.storage import Folder
from tests.workflows.engine.tracking.nights import EXPERIMENT
from workflows.engine.events import EventLog, RunEvent
from workflows.engine.tracking.connection import connect
from workflows.engine.tracking.publisher import mlflow_store, publish_earlier
from workflows.engine.tracking.tracker import RunTracker


class Place:
    """A store, and the MLflow that its runs are published to."""

    def __init__(self, folder: Path, uri: str) -> None:
        self.folder, self.uri = folder, uri
        self.runs = Folder.at(folder / "runs")

    @cached_property
    def client(self) -> Any:
        return connect(self.uri)

    def tracker(self, run: str, uri: str | None = None, warned: str = "") -> RunTracker:
        return RunTracker(tracking_uri=uri or self.uri, runs=self.runs, run=run, warned=warned)

    def log(self, run: str, *batches: Sequence[RunEvent]) -> EventLog:
        log = EventLog(self.runs / run / "events")
        for batch in batches:
            log.append(batch)
        return log

    def catch_up(self, connecting: Callable[[str], Any] = connect) -> list[str]:
        """Publish what is not wholly in MLflow, as a later run's publisher does."""
        return publish_earlier(self.runs, mlflow_store(self.runs, "later", self.uri, connecting))

    def publish(self, run: str, events: Sequence[RunEvent]) -> list[str]:
        self.log(run, events)
        return self.catch_up()

    def is_published(self, run: str) -> bool:
        return (self.runs / run).has("published.json")

    def mlflow_runs(self, where: str = "", experiment: str = EXPERIMENT) -> list[Any]:
        found = self.client.get_experiment_by_name(experiment)
        return list(self.client.search_runs([found.experiment_id], where, order_by=["attributes.start_time"]))

    def picture(self) -> list[Any]:
        """Return all that a person sees in MLflow, without ids."""
        client = self.client
        names = {row.info.run_id: row.info.run_name for row in self.mlflow_runs()}
        seen: list[Any] = []
        for row in self.mlflow_runs():
            tags = {key: names.get(value, value) for key, value in row.data.tags.items()}
            points = {
                key: [(p.step, p.timestamp, p.value) for p in client.get_metric_history(row.info.run_id, key)]
                for key in row.data.metrics
            }
            files = [file.path for file in client.list_artifacts(row.info.run_id)]
            outputs = len(row.outputs.model_outputs)
            times = row.info.start_time, row.info.end_time
            seen.append((row.info.run_name, row.info.status, times, row.data.params, tags, points, files, outputs))
        found = client.get_experiment_by_name(EXPERIMENT)
        for model in client.search_logged_models([found.experiment_id]):
            metrics = [(metric.key, metric.value) for metric in model.metrics]
            seen.append((model.name, str(model.status), model.tags, model.params, metrics))
        for version in client.search_model_versions("name = 'llama-6l'"):
            seen.append((version.version, version.aliases, version.tags, names[version.run_id]))
        return sorted(seen, key=repr)


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
