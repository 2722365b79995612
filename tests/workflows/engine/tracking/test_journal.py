"""The journal keeps every batch, once, without secrets, and for one sender at a time."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from workflows.engine.tracking.journal import Journal, unfinished

from stages.storage import AlreadyExists, Folder
from tests.workflows.engine.tracking.nights import night
from workflows.engine.events import StepClosed
from workflows.engine.lease import holder_of


@pytest.fixture
def runs(tmp_path: Path) -> Folder:
    return Folder.at(tmp_path / "runs")


def test_append_read_gives_the_same_records(runs: Folder) -> None:
    journal, records = Journal(runs / "r" / "ledger"), night("r")
    assert [journal.append(records[:4]), journal.append(records[4:])] == [1, 2]
    assert journal.read(1) + journal.read(2) == records
    assert journal.numbers() == [1, 2]


def test_append_values_json_lacks_survive(runs: Folder) -> None:
    import numpy as np

    journal = Journal(runs / "r" / "ledger")
    metrics = {"nan": math.nan, "inf": math.inf, "half": np.float32(0.5)}
    journal.append([StepClosed("r", "s", 1, 5, "FAILED", metrics, {}, {}, "")])
    (record,) = journal.read(1)
    assert isinstance(record, StepClosed)
    assert math.isnan(record.metrics["nan"])
    assert (record.metrics["inf"], record.metrics["half"]) == (math.inf, 0.5)


def test_append_batch_is_never_overwritten(runs: Folder) -> None:
    first, second = Journal(runs / "r" / "ledger"), Journal(runs / "r" / "ledger")
    first.append(night("a"))
    assert second.append(night("b")) == 2
    assert first.read(1) == night("a")
    with pytest.raises(AlreadyExists):
        (runs / "r" / "ledger").put("000001.json", b"{}", create=True)


def test_append_secrets_are_masked_in_the_store(runs: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf-very-secret-value")
    journal = Journal(runs / "r" / "ledger")
    journal.append(
        [StepClosed("r", "s", 1, 5, "FAILED", {}, {}, {"error": "401 for hf-very-secret-value at http://u:pw@h"}, "")]
    )
    stored = (runs / "r" / "ledger").get("000001.json").decode()
    assert "hf-very-secret-value" not in stored
    assert "u:pw" not in stored


def test_sent_highest_mark_counts(runs: Folder) -> None:
    journal = Journal(runs / "r" / "ledger")
    assert journal.sent() == 0
    for number in (1, 2, 10, 2):
        journal.mark_sent(number)
    assert journal.sent() == 10


def test_acquire_living_holder_keeps_it_until_it_releases(runs: Folder) -> None:
    journal = Journal(runs / "r" / "ledger")
    term = journal.sender.acquire(holder_of("r", os.getpid()))
    assert term == 1
    assert journal.sender.acquire(holder_of("r", os.getpid())) == holder_of("r", os.getpid())
    journal.sender.release(term)
    assert journal.sender.acquire(holder_of("r", os.getpid())) == 2


def test_acquire_dead_holder_loses_it_at_once(runs: Folder) -> None:
    journal = Journal(runs / "r" / "ledger")
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert journal.sender.acquire(holder_of("r", child.pid)) == 1
    assert journal.sender.acquire(holder_of("r", os.getpid())) == holder_of("r", child.pid)
    child.communicate(b"\n")
    assert journal.sender.acquire(holder_of("r", os.getpid())) == 2


def test_unfinished_finished_runs_are_left_out(runs: Folder) -> None:
    for run in ("b", "a", "c"):
        Journal(runs / run / "ledger").append(night(run))
    Journal(runs / "a" / "ledger").finish()
    assert [run for run, _ in unfinished(runs)] == ["b", "c"]
