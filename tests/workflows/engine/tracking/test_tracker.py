"""The driver's side of the ledger: with MLflow out of reach, its process killed, and secrets in what is recorded."""

import logging
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from workflows.engine.tracking.journal import Journal

from tests.workflows.engine.tracking.nights import night, opened, short_night
from tests.workflows.engine.tracking.place import Place, as_fields, by_name, free_port, wait_until
from workflows.engine.events import RunClosed, StepClosed
from workflows.engine.tracking.publisher import replay
from workflows.engine.tracking.tracker import TELLER

DRIVER = """
import os, signal, sys, time
from stages.storage import Folder
from tests.workflows.engine.tracking.nights import night
from workflows.engine.tracking.tracker import RunTracker
from workflows.engine.tracking.tracking_uri import default_tracking_uri
root = sys.argv[1]
runs = Folder.at(root + "/runs")
ledger = RunTracker(tracking_uri=default_tracking_uri(root), artifact_root=root + "/mlflow/artifacts", runs=runs, run="r")
for record in night("r")[:6]:
    ledger.record(record)
while not ledger.state.sent:
    time.sleep(0.05)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.fault
def test_ledger_killed_driver_leaves_no_run_running(sqlite: Place) -> None:
    driver = subprocess.run([sys.executable, "-c", DRIVER, str(sqlite.folder)], timeout=120)
    assert driver.returncode == -signal.SIGKILL
    journal = Journal(sqlite.runs / "r" / "ledger")
    wait_until(journal.finished, 60)
    assert {row.info.run_name: row.info.status for row in sqlite.mlflow_runs()} == {
        "r": "KILLED",
        "corpus": "FINISHED",
        "teacher": "FINISHED",
    }
    assert sqlite.replay() == 0


@pytest.mark.server
def test_ledger_server_down_work_goes_on_and_the_next_replay_sends_all(
    server_uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = Place(tmp_path, server_uri)
    down = f"http://me:hunter2@127.0.0.1:{free_port()}"
    experiment = "outage/llama-6l"
    records = [
        type(record)(**{**as_fields(record), "experiment": experiment}) if index == 0 else record
        for index, record in enumerate(night("out-1", candidates=[], champion=None))
    ]
    with caplog.at_level(logging.WARNING, logger="workflows.engine.tracking"):
        ledger = place.ledger("out-1", down)
        assert ledger.state.degraded
        for record in records:
            ledger.record(record)
        state = ledger.close(60)
    assert (state.sent, state.waiting, state.degraded) == (0, len(records), True)
    assert sum("work goes on" in record.getMessage() for record in caplog.records) == 1
    assert "hunter2" not in caplog.text
    assert replay(place.runs, tracking_uri=down, artifact_root=place.root) == 0
    assert place.replay() == len(records)
    assert place.replay() == 0
    found = place.client.get_experiment_by_name(experiment)
    assert len(place.client.search_runs([found.experiment_id])) == 6


def test_ledger_server_that_never_answers_is_given_up_in_time(sqlite: Place) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        ledger = sqlite.ledger("r", f"http://127.0.0.1:{silent.getsockname()[1]}")
        for record in short_night():
            ledger.record(record)
        began = time.monotonic()
        state = ledger.close(2.0)
        assert time.monotonic() - began < 10
    assert (state.sent, state.waiting) == (0, len(short_night()))
    assert state.error
    assert sqlite.replay() == len(short_night())


def test_ledger_place_that_cannot_be_written_is_told_and_the_journal_keeps_all(sqlite: Place) -> None:
    (sqlite.folder / "file").write_text("not a folder")
    ledger = sqlite.ledger("r", f"sqlite:///{sqlite.folder}/file/mlflow.db")
    ledger.record(opened("r"))
    state = ledger.close(60)
    assert (state.sent, state.waiting) == (0, 1)
    assert "cannot make the ledger's file" in str(state.error)
    assert sqlite.replay() == 1


@pytest.mark.fault
def test_ledger_its_process_is_killed_and_the_next_replay_sends_all(sqlite: Place) -> None:
    ledger = sqlite.ledger("r")
    (child,) = [p for p in psutil.Process().children() if TELLER in p.cmdline()]
    child.kill()
    for record in short_night():
        ledger.record(record)
    state = ledger.close(60)
    assert (state.sent, state.waiting, state.degraded) == (0, len(short_night()), True)
    assert sqlite.replay() == len(short_night())


def test_ledger_no_secret_reaches_mlflow_or_the_store(sqlite: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMIK7MDENG")
    leak = "wJalrXUtnFEMIK7MDENG at https://me:hunter2@host/"
    record = StepClosed(
        "r", "teacher", 1, 1300, "FAILED", {}, {"source": leak}, {"error": leak}, f'{{"uri": "{leak}"}}'
    )
    ended = RunClosed("r", 1400, "FAILED", f"failed: {leak}")
    sqlite.tell("r", [opened("r"), record, ended])
    assert by_name(sqlite.mlflow_runs())["teacher"].data.params["source"] == "*** at https://***@host/"
    written = b"".join(path.read_bytes() for path in sqlite.folder.rglob("*") if path.is_file())
    assert b"wJalrXUtnFEMIK7MDENG" not in written
    assert b"hunter2" not in written


def test_ledger_module_import_is_light() -> None:
    code = "import sys, workflows.engine.tracking.tracker; print([m for m in ('mlflow', 'ray', 'torch', 'pandas') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
