"""The log keeps every event, once, in order and without secrets."""

import math
from pathlib import Path
from typing import Any

import pytest

from stages.storage import AlreadyExists, File, Folder
from tests.workflows.engine.tracking.nights import ended, night
from workflows.engine.events import AttemptEnded, CurvePoints, EventLog


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder.at(tmp_path / "runs/r/events")


def test_append_read_gives_the_same_events(folder: Folder) -> None:
    log, events = EventLog(folder), night("r")
    assert [log.append(events[:4]), log.append(events[4:])] == [1, 2]
    assert EventLog(folder).read_all() == events
    reader = EventLog(folder)
    assert [reader.read_new(), reader.read_new()] == [events, []]


def test_read_many_batches_are_in_order(folder: Folder) -> None:
    log, events = EventLog(folder), night("r") * 3
    for event in events:
        log.append([event])
    assert log.read_all() == events


def test_append_values_json_lacks_survive(folder: Folder) -> None:
    import numpy as np

    log = EventLog(folder)
    log.append([ended("s", 1, 5, metrics={"nan": math.nan, "inf": math.inf, "half": np.float32(0.5)})])
    points: Any = (("loss", np.float32(0.5), np.int64(3), 5),)
    log.append([CurvePoints(step="s", attempt=1, points=points)])
    event, curves = log.read_all()
    assert isinstance(event, AttemptEnded)
    assert math.isnan(event.metrics["nan"])
    assert (event.metrics["inf"], event.metrics["half"]) == (math.inf, 0.5)
    assert isinstance(curves, CurvePoints)
    assert curves.points == (("loss", 0.5, 3, 5),)


def test_append_batch_is_never_overwritten(folder: Folder) -> None:
    first, second = EventLog(folder), EventLog(folder)
    first.append(night("a"))
    assert second.append(night("b")) == 2
    assert first.read_all() == night("a") + night("b")
    with pytest.raises(AlreadyExists):
        folder.put("000001.json", b"{}", create=True)


@pytest.mark.parametrize("loss", [0.5, math.nan], ids=str)
def test_append_answer_that_was_lost_writes_no_event_twice(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, loss: float
) -> None:
    log, put = EventLog(folder), Folder.put
    first, rest = [CurvePoints(step="s", attempt=1, points=(("loss", loss, 1, 5),))], night("r")

    def lose_the_answer(self: Folder, name: str, data: bytes, **options: Any) -> File:
        put(self, name, data, **options)
        raise OSError("connection reset")

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "put", lose_the_answer)
        with pytest.raises(OSError, match="reset"):
            log.append(first)
    assert log.append([*first, *rest]) == 2
    assert len(log.read_all()) == 1 + len(rest)


def test_read_ends_gives_the_first_and_the_last_batch(folder: Folder) -> None:
    log, events = EventLog(folder), night("r")
    assert log.read_ends() is None
    log.append(events[:2])
    assert log.read_ends() == events[:2]
    log.append(events[2:5])
    log.append(events[5:])
    assert log.read_ends() == [*events[:2], *events[5:]]


def test_append_secrets_are_redacted_in_the_store(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf-very-secret-value")
    EventLog(folder).append([ended("s", 1, 5, tags={"error": "401 for hf-very-secret-value at http://u:pw@h"})])
    stored = folder.get("000001.json").decode()
    assert "hf-very-secret-value" not in stored
    assert "u:pw" not in stored


def test_read_torn_batch_is_left_out_with_a_word(folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    log = EventLog(folder)
    for event in night("r")[:3]:
        log.append([event])
    folder.put("000002.json", b'[{"type"')
    assert log.read_all() == [night("r")[0], night("r")[2]]
    assert "000002.json cannot be read" in caplog.text
