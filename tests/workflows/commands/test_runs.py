"""`stillhouse runs`: what people see of earlier runs, and what they publish anew."""

import json
from pathlib import Path

import pytest

from tests.workflows.engine.tracking.nights import night
from workflows.cli import run_command
from workflows.engine.events import EventLog
from workflows.engine.store import ArtifactStore
from workflows.engine.tracking.queries import read_candidates


@pytest.fixture
def store(tmp_path: Path) -> str:
    made = ArtifactStore(str(tmp_path / "store"))
    for run, at_ms in (("a", 1000), ("b", 90_000)):
        EventLog(made.root / "runs" / run / "events").append(night(run, at_ms))
    (made.root / "runs" / "starting").put_json("heartbeat.json", {})
    return made.uri


def test_runs_list_names_every_run_that_recorded_something(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["runs", "list", "--store", store, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["runs"]
    assert [(row["run"], row["status"], row["workflow"]) for row in rows] == [
        ("a", "FINISHED", "quickstart"),
        ("b", "FINISHED", "quickstart"),
    ]


def test_runs_publish_fills_an_mlflow_that_was_empty(
    store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = f"sqlite:///{tmp_path}/empty.db"
    assert run_command(["runs", "publish", "b", "--store", store, "--tracking-uri", uri, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"published": ["b"]}
    assert {tuple(row["runs"]) for row in read_candidates(uri)} == {("b",)}
    assert run_command(["runs", "publish", "--store", store, "--tracking-uri", uri]) == 0
    assert "published 2 runs: a, b" in capsys.readouterr().out
    assert {tuple(row["runs"]) for row in read_candidates(uri)} == {("a", "b")}


def test_runs_publish_unknown_run_is_refused(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["runs", "publish", "c", "--store", store, "--json"]) == 2
    assert "no run 'c'" in json.loads(capsys.readouterr().out)["error"]["message"]
