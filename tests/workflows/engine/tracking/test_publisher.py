"""Runs published to MLflow exactly once, whatever is killed on the way; and earlier ones behind the work."""

import threading
from collections.abc import Sequence
from typing import Any

import pytest

from tests.workflows.engine.tracking.nights import ended, night, short_night, started, step
from tests.workflows.engine.tracking.place import Place, by_name, free_port
from workflows.engine.events import EventLog, RunEvent
from workflows.engine.heartbeat import Holder, Liveness
from workflows.engine.tracking import publisher
from workflows.engine.tracking.connection import connect
from workflows.engine.tracking.mlflow_store import MlflowStore
from workflows.engine.tracking.publisher import (
    Publication,
    follow,
    mlflow_store,
    publish_earlier,
    publish_runs,
    publisher_lease,
)
from workflows.engine.tracking.tracking_uri import TrackingUnavailable, default_tracking_uri
from workflows.engine.tracking.view import RunView


class Killed(BaseException):
    """The process died here: nothing below may catch it."""


class Mortal:
    """A client in whose n-th call the process is killed: MLflow has done it, and nobody heard of it.

    Killed before a call is killed after the one before it, as far as MLflow and the store know.
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


def test_publish_killed_in_any_call_ends_with_the_same_mlflow(sqlite: Place, tmp_path: Any) -> None:
    sqlite.publish("r", short_night())
    expected = sqlite.picture()
    for fatal in range(1, 200):
        folder = tmp_path / str(fatal)
        place = Place(folder, default_tracking_uri(str(folder)))
        place.log("r", short_night()[:3], short_night()[3:])
        made: list[Mortal] = []

        def connect_mortal(uri: str, made: list[Mortal] = made, fatal: int = fatal) -> Mortal:
            made.append(Mortal(connect(uri), fatal))
            return made[0]

        try:
            place.catch_up(connect_mortal)
        except Killed:
            place.catch_up()
            assert place.picture() == expected, f"killed in call {fatal}"
            assert place.catch_up() == []
        else:
            break
    assert made[0].calls == fatal - 1 > 20


def test_publish_killed_before_the_mark_changes_nothing_the_next_time(
    sqlite: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    sqlite.log("r", short_night())

    def kill(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(publisher, "mark_published", kill)
        with pytest.raises(Killed):
            sqlite.catch_up()
    before = sqlite.picture()
    assert sqlite.catch_up() == ["r"]
    assert sqlite.picture() == before
    assert sqlite.catch_up() == []


def test_publish_dead_run_is_sent_and_ended(sqlite: Place) -> None:
    corpus, teacher = step("corpus", "Prepare", 1100, hit=True), step("teacher", "Train", 1200)[:2]
    assert sqlite.publish("r", [started("r"), *corpus, *teacher]) == ["r"]
    rows = by_name(sqlite.mlflow_runs())
    assert {name: (row.info.status, row.info.end_time) for name, row in rows.items()} == {
        "r": ("KILLED", 1202),
        "teacher": ("KILLED", 1202),
        "corpus": ("FINISHED", 1190),
    }


def test_publish_run_whose_driver_lives_is_sent_and_stays_open(sqlite: Place) -> None:
    """Its own publisher was killed: what it still records is sent later, and it is not ended for it."""
    log = sqlite.log("r", short_night()[:4])
    beat = sqlite.runs / "r"
    beat.put_json("heartbeat.json", Holder.of_this_process("r").to_json())
    assert sqlite.catch_up() == ["r"]
    assert by_name(sqlite.mlflow_runs())["r"].info.status == "RUNNING"
    log.append(short_night()[4:])
    beat.delete(["heartbeat.json"])
    assert sqlite.catch_up() == ["r"]
    assert by_name(sqlite.mlflow_runs())["r"].info.status == "FINISHED"
    assert sqlite.is_published("r")


def test_publish_run_with_a_living_publisher_is_left_alone(sqlite: Place) -> None:
    sqlite.log("r", short_night())
    lease = publisher_lease(sqlite.runs, "r", Liveness(sqlite.runs))
    term = lease.acquire(Holder.of_this_process("r"))
    assert isinstance(term, int)
    assert sqlite.catch_up() == []
    lease.release(term)
    assert sqlite.catch_up() == ["r"]


def test_publish_nothing_waiting_touches_no_mlflow(sqlite: Place) -> None:
    sqlite.publish("r", short_night())

    def never(_: str) -> Any:
        raise AssertionError("there was nothing to send")

    assert sqlite.catch_up(never) == []


class Picky:
    """A client of an MLflow that never takes a run of one name."""

    def __init__(self, client: Any, refused: str) -> None:
        self._client, self._refused = client, refused

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def create_run(self, *args: Any, run_name: str, **kwargs: Any) -> Any:
        if run_name == self._refused:
            raise ValueError("it is too odd")
        return self._client.create_run(*args, run_name=run_name, **kwargs)


@pytest.mark.parametrize("refused", ["teacher", "student"])
def test_publish_what_mlflow_never_takes_is_refused_and_the_rest_is_sent(
    sqlite: Place, caplog: pytest.LogCaptureFixture, refused: str
) -> None:
    sqlite.log("r", night("r", steps=2, candidates=["student", "student-w8a8"]))
    assert sqlite.catch_up(lambda uri: Picky(connect(uri), refused)) == ["r"]
    assert f"MLflow does not take {refused} (" in caplog.text
    assert "it is too odd" in caplog.text
    sent = {"r", "corpus", "teacher", "student", "student-w8a8"} - {refused}
    assert {row.info.run_name: row.info.status for row in sqlite.mlflow_runs()} == dict.fromkeys(sent, "FINISHED")
    assert sqlite.catch_up() == []


def test_publish_run_that_does_not_say_how_it_began_holds_up_no_other(
    sqlite: Place, caplog: pytest.LogCaptureFixture
) -> None:
    sqlite.log("a", short_night()[1:])
    (sqlite.runs / "b" / "events").put("000001.json", b"")
    assert sqlite.publish("r", short_night()) == ["a", "b", "r"]
    assert caplog.text.count("how the run began") == 2
    assert "r" in by_name(sqlite.mlflow_runs())


# Beside a driver ----------------------------------------------------------------------------------------------------


class FakeStore(MlflowStore):
    """Remembers the views that it was to publish; fails for the first of them."""

    uri = "sqlite:////mlflow.db"

    def __init__(self, *, outages: int = 0) -> None:
        self.views: list[RunView] = []
        self.outages = outages

    def publish(self, view: RunView) -> None:
        if self.outages:
            self.outages -= 1
            raise ConnectionError("no answer from https://me:pw@mlflow")
        self.views.append(view)


class Script(threading.Event):
    """An end of the driver that comes after some looks at it; at each look, what the driver does meanwhile is done."""

    def __init__(self, log: EventLog, *batches: Sequence[RunEvent]) -> None:
        super().__init__()
        self._log, self._batches = log, list(batches)
        self.pauses: list[float | None] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.pauses.append(timeout)
        if self._batches:
            batch = self._batches.pop(0)
            if batch:
                self._log.append(batch)
        else:
            self.set()
        return self.is_set()


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publisher, "CLOSING_PAUSE_SECONDS", 0.0)


def run_follow(place: Place, store: FakeStore, *batches: Sequence[RunEvent]) -> tuple[str | None, Script]:
    script = Script(place.log("r"), *batches)
    return follow("r", place.runs, store, script), script


def test_follow_publishes_the_whole_run_as_it_grows(sqlite: Place) -> None:
    store = FakeStore()
    error, _ = run_follow(sqlite, store, night("r")[:3], [], night("r")[3:])
    assert error is None
    assert [len(view.rows) for view in store.views] == [2, 6, 6]
    assert sqlite.is_published("r")


def test_follow_outage_is_waited_for_longer_and_longer(sqlite: Place, caplog: pytest.LogCaptureFixture) -> None:
    store = FakeStore(outages=3)
    error, script = run_follow(sqlite, store, night("r"), [], [], [])
    assert error is None
    assert script.pauses[1:4] == [1.0, 2.0, 5.0]
    assert len(store.views[0].rows) == 6
    assert caplog.text.count("(no answer from https://***@mlflow); work goes on") == 1


def test_follow_outage_at_the_end_gives_up_and_the_store_keeps_all(sqlite: Place) -> None:
    store = FakeStore(outages=99)
    error, _ = run_follow(sqlite, store, night("r"))
    assert error == "no answer from https://***@mlflow"
    assert store.views == []
    assert not sqlite.is_published("r")


def test_follow_killed_driver_leaves_no_row_open(sqlite: Place) -> None:
    store = FakeStore()
    run_follow(sqlite, store, night("r")[:6])
    assert {(row.name, row.status) for row in store.views[-1].rows} == {
        ("r", "KILLED"),
        ("corpus", "FINISHED"),
        ("teacher", "FINISHED"),
    }
    assert sqlite.is_published("r")


# Earlier runs -------------------------------------------------------------------------------------------------------


class Refusing(FakeStore):
    """An MLflow that answers, but fails for some runs each time; or one that is gone after that."""

    def __init__(self, *runs: str, gone: bool = False) -> None:
        super().__init__()
        self.runs = runs
        if gone:
            self.uri = f"http://127.0.0.1:{free_port()}"

    def publish(self, view: RunView) -> None:
        if view.run in self.runs:
            raise RuntimeError(f"500 for {view.run} at https://me:pw@mlflow")
        super().publish(view)


@pytest.fixture
def three(sqlite: Place) -> Place:
    for run in ("a", "b", "c"):
        sqlite.log(run, night(run))
    return sqlite


def test_publish_earlier_run_that_always_fails_holds_up_no_other(
    three: Place, caplog: pytest.LogCaptureFixture
) -> None:
    store = Refusing("a")
    assert publish_earlier(three.runs, store) == ["b", "c"]
    assert [three.is_published(run) for run in ("a", "b", "c")] == [False, True, True]
    assert "a (500 for a at https://***@mlflow)" in caplog.text
    assert publish_earlier(three.runs, FakeStore()) == ["a"]


def test_publish_earlier_stops_where_mlflow_is_gone(three: Place) -> None:
    store = Refusing("b", gone=True)
    with pytest.raises(TrackingUnavailable):
        publish_earlier(three.runs, store)
    assert [view.run for view in store.views] == ["a"]
    assert [three.is_published(run) for run in ("a", "b", "c")] == [True, False, False]


# On command ---------------------------------------------------------------------------------------------------------


def test_publish_runs_fills_an_empty_mlflow_with_the_same(sqlite: Place) -> None:
    sqlite.publish("a", night("a"))
    sqlite.publish("b", night("b", at_ms=50_000, champion="student-w4a16"))
    sqlite.publish("c", [started("c", 90_000), *step("corpus", "Prepare", 90_100, hit=True)])
    second = Place(sqlite.folder, f"sqlite:///{sqlite.folder}/second.db")
    assert names(on_command(second, ["a", "b", "c"])) == ["a", "b", "c"]
    assert second.picture() == sqlite.picture()
    before = rows_of(second)
    assert names(on_command(second, ["b"])) == ["b"]
    assert names(on_command(second, ["a", "b", "c"])) == ["a", "b", "c"]
    assert rows_of(second) == before


def on_command(place: Place, runs: Sequence[str]) -> list[Publication]:
    return list(publish_runs(place.runs, runs, mlflow_store(place.runs, "publish", place.uri)))


def names(found: Sequence[Publication]) -> list[str]:
    return [run.run for run in found if run.published]


def rows_of(place: Place) -> dict[str, list[Any]]:
    """Return every row of every table of a sqlite file."""
    import sqlite3
    from contextlib import closing

    with closing(sqlite3.connect(place.uri.removeprefix("sqlite:///"))) as database:
        tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return {name: sorted(database.execute(f'SELECT * FROM "{name}"').fetchall(), key=repr) for name in tables}


def test_publish_runs_dead_server_is_unavailable(sqlite: Place) -> None:
    sqlite.log("r", short_night())
    with pytest.raises(TrackingUnavailable):
        on_command(Place(sqlite.folder, f"http://127.0.0.1:{free_port()}"), ["r"])


def test_publish_attempt_that_failed_shows_its_error(sqlite: Place) -> None:
    begin, _, _ = step("teacher", "Train", 1200)
    failed = ended("teacher", 1, 1300, "FAILED", tags={"error": "worker lost"})
    sqlite.publish("r", [started("r"), begin, failed])
    row = by_name(sqlite.mlflow_runs())["teacher"]
    assert (row.info.status, row.data.tags["error"]) == ("FAILED", "worker lost")
