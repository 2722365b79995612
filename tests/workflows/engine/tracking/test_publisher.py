"""Journals told to MLflow exactly once, whatever is killed on the way."""

import os
from pathlib import Path
from typing import Any

import pytest
from workflows.engine.tracking.journal import Journal

from tests.workflows.engine.tracking.nights import EXPERIMENT, night, opened, short_night, step
from tests.workflows.engine.tracking.place import Place, by_name
from workflows.engine.heartbeat import Holder
from workflows.engine.lease import holder_of
from workflows.engine.tracking.connection import Connection, connect
from workflows.engine.tracking.tracking_uri import default_tracking_uri


class Killed(BaseException):
    """The process died here: nothing below may catch it."""


class Mortal:
    """A client in whose n-th call the process is killed: MLflow has done it, and nobody heard of it.

    Killed before a call is killed after the one before it, as far as MLflow and the journal know.
    """

    def __init__(self, client: Any, fatal: int) -> None:
        self._client, self._fatal = client, fatal
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            self.calls += 1
            if self.calls == self._fatal:
                raise Killed
            return result

        return call


def picture(place: Place) -> list[Any]:
    """Return all that a person sees in MLflow, without ids."""
    client = place.client
    names = {row.info.run_id: row.info.run_name for row in place.mlflow_runs()}
    seen: list[Any] = []
    for row in place.mlflow_runs():
        tags = {key: names.get(value, value) for key, value in row.data.tags.items()}
        points = {
            key: [(p.step, p.timestamp, p.value) for p in client.get_metric_history(row.info.run_id, key)]
            for key in row.data.metrics
        }
        files = [file.path for file in client.list_artifacts(row.info.run_id)]
        outputs = len(row.outputs.model_outputs)
        seen.append(
            (row.info.run_name, row.info.status, row.info.end_time, row.data.params, tags, points, files, outputs)
        )
    experiment = client.get_experiment_by_name(EXPERIMENT)
    for model in client.search_logged_models([experiment.experiment_id]):
        seen.append(
            (model.name, str(model.status), model.tags, model.params, [(m.key, m.value) for m in model.metrics])
        )
    for version in client.search_model_versions("name = 'llama-6l'"):
        seen.append((version.version, version.aliases, version.tags, names[version.run_id]))
    return seen


def test_replay_killed_in_any_call_ends_with_the_same_ledger(sqlite: Place, tmp_path: Path) -> None:
    sqlite.tell("r", short_night())
    expected = picture(sqlite)
    for fatal in range(1, 200):
        folder = tmp_path / str(fatal)
        place = Place(folder, default_tracking_uri(str(folder)))
        place.journal("r", short_night()[:3], short_night()[3:])
        made: list[Mortal] = []

        def connect_mortal(uri: str, root: str, made: list[Mortal] = made, fatal: int = fatal) -> Connection:
            made.append(Mortal(connect(uri, root).client, fatal))
            return Connection(made[0], uri, root)

        try:
            place.replay(connect_mortal)
        except Killed:
            place.replay()
            assert picture(place) == expected, f"killed in call {fatal}"
            assert place.replay() == 0
        else:
            break
    assert made[0].calls == fatal - 1 > 20


def test_replay_killed_before_the_mark_tells_nothing_twice(sqlite: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    sqlite.journal("r", short_night())

    def kill(_: Journal, __: int) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "mark_sent", kill)
        with pytest.raises(Killed):
            sqlite.replay()
    before = picture(sqlite)
    assert sqlite.replay() == len(short_night())
    assert picture(sqlite) == before
    assert sqlite.replay() == 0


def test_replay_dead_run_is_sent_and_ended(sqlite: Place) -> None:
    unclosed = [opened("r"), *step("r", "corpus", "Prepare", 1100, hit=True), *step("r", "teacher", "Train", 1200)[:2]]
    sqlite.journal("r", unclosed)
    assert sqlite.replay() == len(unclosed)
    rows = by_name(sqlite.mlflow_runs())
    assert {name: (row.info.status, row.info.end_time) for name, row in rows.items()} == {
        "r": ("KILLED", 1202),
        "teacher": ("KILLED", 1202),
        "corpus": ("FINISHED", 1190),
    }


def test_replay_run_whose_driver_lives_is_sent_and_stays_open(sqlite: Place) -> None:
    """Its own teller was killed: what it still journals is sent later, and it is not ended for it."""
    journal = sqlite.journal("r", short_night()[:4])
    beat = sqlite.runs / "r"
    beat.put_json("heartbeat.json", Holder.of_this_process("r").to_json())
    assert sqlite.replay() == 4
    assert by_name(sqlite.mlflow_runs())["r"].info.status == "RUNNING"
    journal.append(short_night()[4:])
    beat.delete(["heartbeat.json"])
    assert sqlite.replay() == len(short_night()) - 4
    assert by_name(sqlite.mlflow_runs())["r"].info.status == "FINISHED"
    assert journal.finished()


def test_replay_living_sender_is_left_alone(sqlite: Place) -> None:
    journal = sqlite.journal("r", short_night())
    term = journal.sender.acquire(holder_of("r", os.getpid()))
    assert isinstance(term, int)
    assert sqlite.replay() == 0
    assert journal.sent() == 0
    journal.sender.release(term)
    assert sqlite.replay() == len(short_night())


def test_replay_nothing_waiting_touches_no_mlflow(sqlite: Place) -> None:
    sqlite.tell("r", short_night())

    def never(_: str, __: str) -> Connection:
        raise AssertionError("there was nothing to send")

    assert sqlite.replay(never) == 0


def test_replay_flawed_record_is_refused_and_the_rest_is_sent(sqlite: Place, caplog: pytest.LogCaptureFixture) -> None:
    records = night("r", champion="nobody", candidates=[])
    assert sqlite.tell("r", records) == len(records) - 1
    assert "'nobody', which was never found" in caplog.text
    assert by_name(sqlite.mlflow_runs())["r"].info.status == "FINISHED"
    assert sqlite.replay() == 0
