"""The driver's side of tracking: with MLflow out of reach, its process killed, and secrets in what is recorded."""

import logging
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.workflows.engine.tracking.nights import ended, night, short_night, started, step
from tests.workflows.engine.tracking.place import Place, by_name, free_port, wait_until
from workflows.engine.events import RunEnded
from workflows.engine.tracking.tracker import PUBLISHER

DRIVER = """
import os, signal, sys, time
from stages.storage import Folder
from tests.workflows.engine.tracking.nights import night
from workflows.engine.tracking.tracker import RunTracker
from workflows.engine.tracking.tracking_uri import default_tracking_uri
root = sys.argv[1]
runs = Folder.at(root + "/runs")
tracker = RunTracker(tracking_uri=default_tracking_uri(root), runs=runs, run="r")
for event in night("r")[:6]:
    tracker.record(event)
while not (runs / "r/events").has("000001.json"):
    time.sleep(0.05)
os.kill(os.getpid(), signal.SIGKILL)
"""


def publisher_of(place: Place) -> psutil.Process:
    found = []
    for process in psutil.Process().children():
        with suppress(psutil.ZombieProcess):  # another test's, which ends just now
            if {PUBLISHER, place.runs.uri} <= set(process.cmdline()):
                found.append(process)
    (child,) = found
    return child


@pytest.mark.fault
def test_tracker_killed_driver_leaves_no_run_running(sqlite: Place) -> None:
    driver = subprocess.run([sys.executable, "-c", DRIVER, str(sqlite.folder)], timeout=120)
    assert driver.returncode == -signal.SIGKILL
    wait_until(lambda: sqlite.is_published("r"), 60)
    assert {row.info.run_name: row.info.status for row in sqlite.mlflow_runs()} == {
        "r": "KILLED",
        "corpus": "FINISHED",
        "teacher": "FINISHED",
    }
    assert sqlite.catch_up() == []


@pytest.mark.server
def test_tracker_server_down_work_goes_on_and_a_later_publisher_sends_all(
    server_uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = Place(tmp_path, server_uri)
    down = f"http://me:hunter2@127.0.0.1:{free_port()}"
    events = night("out-1", candidates=[], champion=None, experiment="outage/llama-6l")
    with caplog.at_level(logging.WARNING, logger="workflows.engine.tracking"):
        tracker = place.tracker("out-1", down)
        for event in events:
            tracker.record(event)
        state = tracker.close(60)
    assert state.waiting == len(events)
    assert sum("work goes on" in record.getMessage() for record in caplog.records) == 1
    assert "hunter2" not in caplog.text
    assert place.catch_up() == ["out-1"]
    assert place.catch_up() == []
    assert len(place.mlflow_runs(experiment="outage/llama-6l")) == 6


def test_tracker_server_that_never_answers_is_given_up_in_time(sqlite: Place) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        tracker = sqlite.tracker("r", f"http://127.0.0.1:{silent.getsockname()[1]}")
        for event in short_night():
            tracker.record(event)
        began = time.monotonic()
        state = tracker.close(2.0)
        assert time.monotonic() - began < 10
    assert state.waiting == len(short_night())
    assert state.error
    wait_until(lambda: sqlite.catch_up() == ["r"], 10)  # once the process that was killed is gone


def test_tracker_place_that_cannot_be_written_is_reported_and_the_store_keeps_all(sqlite: Place) -> None:
    (sqlite.folder / "file").write_text("not a folder")
    tracker = sqlite.tracker("r", f"sqlite:///{sqlite.folder}/file/mlflow.db")
    tracker.record(started("r"))
    state = tracker.close(60)
    assert state.waiting == 1
    assert "cannot make MLflow's database" in str(state.error)
    assert sqlite.catch_up() == ["r"]


@pytest.mark.fault
def test_tracker_its_publisher_is_killed_and_a_later_one_sends_all(sqlite: Place) -> None:
    tracker = sqlite.tracker("r")
    publisher_of(sqlite).kill()
    for event in short_night():
        tracker.record(event)
    state = tracker.close(60)
    assert state.waiting == len(short_night())
    assert sqlite.catch_up() == ["r"]


def test_tracker_earlier_run_is_published_behind_this_one(sqlite: Place) -> None:
    sqlite.log("earlier", night("earlier"))
    tracker = sqlite.tracker("r")
    for event in night("r", at_ms=900_000):
        tracker.record(event)
    state = tracker.close(60)
    assert (state.waiting, state.error) == (0, None)
    wait_until(lambda: sqlite.is_published("earlier"), 60)
    assert {row.info.run_name for row in sqlite.mlflow_runs("tags.kind = 'workflow'")} == {"earlier", "r"}


def test_tracker_dead_server_with_earlier_runs_does_not_delay_the_start(sqlite: Place) -> None:
    for run in ("a", "b", "c"):
        sqlite.log(run, short_night())
    began = time.monotonic()
    tracker = sqlite.tracker("r", f"http://127.0.0.1:{free_port()}")
    assert time.monotonic() - began < 5
    tracker.close(0.1)


def test_tracker_password_of_the_tracking_uri_stands_in_no_argument_and_no_log(
    sqlite: Place, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        tracker = sqlite.tracker("r", f"http://me:hunter2@127.0.0.1:{free_port()}")
        child = publisher_of(sqlite)
        assert "hunter2" not in " ".join(child.cmdline())
        assert "hunter2" not in str(child.environ())
        tracker.record(started("r"))
        state = tracker.close(60)
    assert "hunter2" not in caplog.text + str(state)


def test_tracker_no_secret_reaches_mlflow_or_the_store(sqlite: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMIK7MDENG")
    leak = "wJalrXUtnFEMIK7MDENG at https://me:hunter2@host/"
    begin = step("teacher", "Train", 1200)[0].model_copy(update={"config": {"source": leak, "nested": {"uri": leak}}})
    failed = ended("teacher", 1, 1300, "FAILED", tags={"error": leak})
    over = RunEnded(at_ms=1400, status="FAILED", note=f"failed: {leak}")
    sqlite.publish("r", [started("r"), begin, failed, over])
    assert by_name(sqlite.mlflow_runs())["teacher"].data.params["source"] == "*** at https://***@host/"
    written = b"".join(path.read_bytes() for path in sqlite.folder.rglob("*") if path.is_file())
    assert b"wJalrXUtnFEMIK7MDENG" not in written
    assert b"hunter2" not in written


@pytest.mark.parametrize("module", ["tracker", "publisher", "queries"])
def test_tracking_module_import_is_light(module: str) -> None:
    code = f"import sys, workflows.engine.tracking.{module}; print([m for m in ('mlflow', 'ray', 'torch', 'pandas') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
