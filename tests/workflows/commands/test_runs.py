"""`stillhouse runs`: what people see of earlier runs, and what they publish anew."""

import json
from pathlib import Path

import pytest

from stages.storage import Folder
from tests.workflows.engine.tracking.nights import night
from workflows.cli import run_command
from workflows.engine.events import EventLog
from workflows.engine.heartbeat import Holder, Liveness
from workflows.engine.store import ArtifactStore
from workflows.engine.tracking.mlflow_store import MlflowStore
from workflows.engine.tracking.publisher import publisher_lease
from workflows.engine.tracking.queries import query_candidates
from workflows.engine.tracking.view import RunView


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
    assert json.loads(capsys.readouterr().out) == {"published": ["b"], "left_out": [], "failed": {}}
    assert {tuple(row["runs"]) for row in query_candidates(uri)} == {("b",)}
    assert run_command(["runs", "publish", "--store", store, "--tracking-uri", uri]) == 0
    assert "published 2 runs: a, b" in capsys.readouterr().out
    assert {tuple(row["runs"]) for row in query_candidates(uri)} == {("a", "b")}


def test_runs_publish_unknown_run_is_refused(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["runs", "publish", "c", "--store", store, "--json"]) == 2
    assert "no run 'c'" in json.loads(capsys.readouterr().out)["error"]["message"]


def test_runs_list_torn_first_batch_hides_no_other_run(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    events = Folder.at(store) / "runs" / "torn" / "events"
    events.put("000001.json", b"")
    EventLog(events).append(night("torn")[1:])
    assert run_command(["runs", "list", "--store", store, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["runs"]
    assert [(row["run"], row["status"]) for row in rows] == [
        ("a", "FINISHED"),
        ("b", "FINISHED"),
        ("torn", "UNREADABLE"),
    ]
    assert run_command(["runs", "list", "--store", store]) == 0
    assert "UNREADABLE" in capsys.readouterr().out


def test_runs_list_without_runs_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = ArtifactStore(str(tmp_path / "empty"))
    empty.root.put("artifacts/keep", b"")
    assert run_command(["runs", "list", "--store", empty.uri]) == 0
    assert "no runs yet" in capsys.readouterr().out


def test_runs_publish_run_that_another_process_publishes_is_named(
    store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = Folder.at(store) / "runs"
    publisher_lease(runs, "b", Liveness(runs)).acquire(Holder.of_this_process("b"))
    assert run_command(["runs", "publish", "--store", store]) == 0
    printed = capsys.readouterr().out
    assert "published 1 run: a" in printed
    assert "another process publishes them at this moment: b" in printed


def test_runs_publish_run_that_fails_is_named_and_the_exit_code_says_so(
    store: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = MlflowStore.publish

    def fail_for_a(self: MlflowStore, view: RunView) -> None:
        if view.run == "a":
            raise RuntimeError("500")
        publish(self, view)

    monkeypatch.setattr(MlflowStore, "publish", fail_for_a)
    assert run_command(["runs", "publish", "--store", store]) == 1
    printed = capsys.readouterr().out
    assert "published 1 run: b" in printed
    assert "a could not be published: 500" in printed
