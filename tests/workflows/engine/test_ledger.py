"""What stands in MLflow, on sqlite and through a real server, whatever is killed on the way."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
import pytest

from stages.errors import ConfigError
from stages.storage import Folder
from tests.workflows.engine.ledger_records import EXPERIMENT, SCORES, candidate, night, opened, step, verdict
from workflows.engine.books import Connection
from workflows.engine.heartbeat import Liveness
from workflows.engine.journal import Journal
from workflows.engine.ledger import (
    Ledger,
    LedgerUnavailable,
    Mlflow,
    check_tracking_uri,
    connect,
    default_tracking_uri,
    read_candidates,
    registered_fingerprints,
    replay,
)
from workflows.engine.records import Record, RunClosed, StepClosed
from workflows.engine.turns import holder_of

START_SECONDS = 120.0
"""How long the server may take on a loaded machine; alone it takes some 9 s."""


class Place:
    """A store, and the MLflow that its runs are told to."""

    def __init__(self, folder: Path, uri: str) -> None:
        self.folder, self.uri = folder, uri
        self.runs = Folder.at(folder / "runs")
        self.root = str(folder / "mlflow/artifacts")

    @cached_property
    def client(self) -> Any:
        return connect(self.uri, self.root).client

    def ledger(self, run: str, uri: str | None = None) -> Ledger:
        return Ledger(tracking_uri=uri or self.uri, artifact_root=self.root, runs=self.runs, run=run)

    def journal(self, run: str, *batches: Sequence[Record]) -> Journal:
        journal = Journal(self.runs / run / "ledger")
        for batch in batches:
            journal.append(batch)
        return journal

    def replay(self, connecting: Callable[[str, str], Connection] = connect) -> int:
        return replay(self.runs, tracking_uri=self.uri, artifact_root=self.root, connect=connecting)

    def tell(self, run: str, records: Sequence[Record]) -> int:
        self.journal(run, records)
        return self.replay()

    def mlflow_runs(self, where: str = "") -> list[Any]:
        client = self.client
        experiment = client.get_experiment_by_name(EXPERIMENT)
        return list(client.search_runs([experiment.experiment_id], where, order_by=["attributes.start_time"]))


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache that this module shares, so that MLflow's tables are made once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STILLHOUSE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def sqlite(tmp_path: Path) -> Place:
    return Place(tmp_path, default_tracking_uri(str(tmp_path)))


@pytest.fixture(scope="module")
def server_uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("server")
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/db", "--artifacts-destination", str(folder / "artifacts")]
    with (folder / "log").open("w") as log:
        environ = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environ, cwd=folder, start_new_session=True)
    try:
        wait_until(lambda: answers(f"http://127.0.0.1:{port}/health"), START_SECONDS)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGKILL)  # its workers are in the session that it leads
        server.wait(30)


@pytest.fixture
def place(request: pytest.FixtureRequest) -> Place:
    """The place that a test names: a sqlite file or the server, with the experiment to itself."""
    if request.param == "sqlite":
        return request.getfixturevalue("sqlite")  # type: ignore[no-any-return]
    return Place(request.getfixturevalue("tmp_path"), request.getfixturevalue("server_uri"))


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


# What stands in MLflow after one run and after a second one --------------------------------------------------------


@pytest.mark.parametrize("place", ["sqlite", "server"], indirect=True)
def test_ledger_two_nights_stand_in_mlflow_as_described(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "leaderboard.md").write_text("| candidate |")
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    ledger = place.ledger("night-1")
    for record in night("night-1", files=(tmp_path / "leaderboard.md", tmp_path / "lost.png")):
        ledger.record(record)
    state = ledger.close(60)
    assert (state.sent, state.waiting, state.refused, state.error) == (len(night("night-1")), 0, 0, None)

    rows = by_name(place.mlflow_runs())
    assert len(place.mlflow_runs()) == 10
    run = rows["night-1"]
    assert (run.info.status, run.info.start_time, run.info.end_time) == ("FINISHED", 1000, 2002)
    assert run.data.tags["kind"] == "workflow"
    assert run.data.tags["mlflow.note.content"] == "**finished**: all is well"
    assert run.data.params == {"temperature": "2.0"}
    client = place.client
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["leaderboard.md"]
    teacher = next(row for row in place.mlflow_runs("tags.kind = 'step'") if row.info.run_name == "teacher")
    assert teacher.data.tags["mlflow.parentRunId"] == run.info.run_id
    assert {key: teacher.data.tags[key] for key in ("stage", "step", "attempt", "fingerprint", "cache")} == {
        "stage": "Train",
        "step": "teacher",
        "attempt": "1",
        "fingerprint": "f" * 12,
        "cache": "miss",
    }
    assert teacher.data.metrics == {"seconds": 0.09, "train/loss": 3.0}
    assert [(p.step, p.value, p.timestamp) for p in client.get_metric_history(teacher.info.run_id, "train/loss")] == [
        (0, 5.0, 1200),
        (1, 4.0, 1201),
        (2, 3.0, 1202),
    ]
    assert (
        Path(client.download_artifacts(teacher.info.run_id, "config.json", str(tmp_path))).read_text() == '{"seed": 0}'
    )
    assert (rows["corpus"].data.tags["cache"], rows["corpus"].data.tags["made_by_run"]) == ("hit", "an-earlier-run")
    assert_candidates_stand(place, ["night-1"])
    assert_champion(place, {"1": "student-w8a8"}, "1")

    assert place.tell("night-2", night("night-2", at_ms=900_000)) == len(night("night-2"))
    assert_candidates_stand(place, ["night-1", "night-2"])
    assert_champion(place, {"1": "student-w8a8"}, "1")
    assert len(place.mlflow_runs()) == 16
    assert registered_fingerprints(place.uri) == {"2" * 64, SCORES}
    assert list((tmp_path / "cwd").iterdir()) == []
    assert "MLFLOW_TRACKING_URI" not in os.environ


def assert_candidates_stand(place: Place, nights: list[str]) -> None:
    client = place.client
    rows = place.mlflow_runs("tags.kind = 'candidate'")
    assert sorted(row.info.run_name for row in rows) == ["student", "student-w4a16", "student-w8a8", "teacher"]
    for row in rows:
        assert "mlflow.parentRunId" not in row.data.tags
        assert row.info.status == "FINISHED"
        assert row.data.tags["run"] == nights[-1]
        history = client.get_metric_history(row.info.run_id, "final/latency_p50_ms")
        assert [(point.value, point.timestamp) for point in history] == [(3.5, 2000)]
        (output,) = row.outputs.model_outputs
        model = client.get_logged_model(output.model_id)
        assert (model.name, str(model.status), model.source_run_id) == (row.info.run_name, "READY", row.info.run_id)
        assert {metric.key: metric.value for metric in model.metrics} == row.data.metrics
        assert model.params == {"method": "none"}
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert len(client.search_logged_models([experiment.experiment_id])) == 4
    assert experiment.tags["mlflow.experiment.primaryMetric.name"] == "final/kl_to_teacher"
    found = read_candidates(place.uri, run_ids=nights[:1], experiment=EXPERIMENT)
    assert [(c["name"], c["scores"], c["runs"]) for c in found] == [
        (row.info.run_name, SCORES, nights) for row in sorted(rows, key=lambda row: str(row.info.run_name))
    ]
    columns = json.loads(experiment.tags["mlflow.sharedViewState.candidates"])["selectedColumns"]
    assert {f"metrics.`{name}`" for name in found[0]["metrics"]} <= set(columns)
    assert found[0]["metrics"] == {"final/kl_to_teacher": 0.21, "final/size_bytes": 1e6, "final/latency_p50_ms": 3.5}
    assert read_candidates(place.uri, run_ids=["another"]) == []


def assert_champion(place: Place, versions: dict[str, str], champion: str | None) -> None:
    client = place.client
    found = client.search_model_versions("name = 'llama-6l'")
    assert {str(version.version): version.tags["candidate"] for version in found} == versions
    if champion is None:
        assert all(not model.aliases for model in client.search_registered_models())
    else:
        assert str(client.get_model_version_by_alias("llama-6l", "champion").version) == champion


# The registry -------------------------------------------------------------------------------------------------------


def test_verdict_rejected_moves_nothing(sqlite: Place) -> None:
    sqlite.tell("a", night("a", champion=None))
    assert sqlite.client.search_registered_models() == []
    sqlite.tell("b", night("b", at_ms=50_000))
    sqlite.tell("c", night("c", at_ms=90_000, champion=None))
    assert_champion(sqlite, {"1": "student-w8a8"}, "1")
    assert by_name(sqlite.mlflow_runs())["c"].data.tags["verdict"] == "rejected"


def test_verdict_new_champion_remembers_the_one_it_replaced(sqlite: Place) -> None:
    sqlite.tell("a", night("a"))
    sqlite.tell("b", night("b", at_ms=50_000, champion="student-w4a16"))
    assert_champion(sqlite, {"1": "student-w8a8", "2": "student-w4a16"}, "2")
    assert sqlite.client.get_model_version("llama-6l", "2").tags["replaced_version"] == "1"


def test_verdict_told_late_does_not_move_the_alias_back(sqlite: Place) -> None:
    sqlite.tell("b", night("b", at_ms=50_000, champion="student-w4a16"))
    sqlite.tell("a", night("a", at_ms=1000))
    assert_champion(sqlite, {"1": "student-w4a16", "2": "student-w8a8"}, "1")
    assert {row.data.tags["run"] for row in sqlite.mlflow_runs("tags.kind = 'candidate'")} == {"b"}


def test_candidate_measured_anew_shows_the_new_figure_once(sqlite: Place) -> None:
    sqlite.tell("a", [opened("a"), candidate("a", "student", 1000)])
    faster = candidate("b", "student", 2000)
    changed = type(faster)(**{**as_fields(faster), "metrics": {**faster.metrics, "final/latency_p50_ms": 2.5}})
    sqlite.tell("b", [opened("b"), changed])
    (row,) = sqlite.mlflow_runs("tags.kind = 'candidate'")
    history = {key: sqlite.client.get_metric_history(row.info.run_id, key) for key in row.data.metrics}
    assert [point.value for point in history["final/latency_p50_ms"]] == [3.5, 2.5]
    assert [point.value for point in history["final/kl_to_teacher"]] == [0.21]


def as_fields(record: Any) -> dict[str, Any]:
    return {name: getattr(record, name) for name in type(record).__dataclass_fields__}


def test_ledger_runs_that_end_at_once_share_their_candidates(sqlite: Place) -> None:
    nights = [f"night-{index}" for index in range(3)]
    ledgers = [sqlite.ledger(run) for run in nights]
    for index, (ledger, run) in enumerate(zip(ledgers, nights, strict=True)):
        for record in night(run, at_ms=1000 + index, steps=0):
            ledger.record(record)
    with ThreadPoolExecutor() as pool:
        states = list(pool.map(lambda ledger: ledger.close(90), ledgers))
    assert [(state.waiting, state.refused, state.error) for state in states] == [(0, 0, None)] * 3
    rows = sqlite.mlflow_runs("tags.kind = 'candidate'")
    assert len(rows) == 4
    for row in rows:
        history = sqlite.client.get_metric_history(row.info.run_id, "final/kl_to_teacher")
        assert (len(history), len(row.outputs.model_outputs)) == (1, 1)
    assert {tuple(found["runs"]) for found in read_candidates(sqlite.uri)} == {tuple(nights)}
    assert len(sqlite.client.search_model_versions("name = 'llama-6l'")) == 1


# Killed on the way --------------------------------------------------------------------------------------------------


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


def short_night() -> list[Record]:
    return night("r", steps=2, candidates=["student-w8a8"])


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
            return Mlflow(made[0], uri, root)

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


DRIVER = """
import os, signal, sys, time
from stages.storage import Folder
from tests.workflows.engine.ledger_records import night
from workflows.engine.ledger import Ledger, default_tracking_uri
root = sys.argv[1]
runs = Folder.at(root + "/runs")
ledger = Ledger(tracking_uri=default_tracking_uri(root), artifact_root=root + "/mlflow/artifacts", runs=runs, run="r")
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


def test_replay_living_sender_is_left_alone(sqlite: Place) -> None:
    journal = sqlite.journal("r", short_night())
    term = journal.sender.take(holder_of("r", os.getpid()), Liveness(sqlite.runs))
    assert term is not None
    assert sqlite.replay() == 0
    assert journal.sent() == 0
    journal.sender.let_go(term)
    assert sqlite.replay() == len(short_night())


def test_replay_nothing_waiting_touches_no_mlflow(sqlite: Place) -> None:
    sqlite.tell("r", short_night())

    def never(_: str, __: str) -> Connection:
        raise AssertionError("there was nothing to send")

    assert sqlite.replay(never) == 0


# MLflow out of reach ------------------------------------------------------------------------------------------------


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
    with caplog.at_level(logging.WARNING, logger="workflows.engine.ledger"):
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
    (child,) = [p for p in psutil.Process().children() if "workflows.engine.ledger" in p.cmdline()]
    child.kill()
    for record in short_night():
        ledger.record(record)
    state = ledger.close(60)
    assert (state.sent, state.waiting, state.degraded) == (0, len(short_night()), True)
    assert sqlite.replay() == len(short_night())


def test_replay_flawed_record_is_refused_and_the_rest_is_sent(sqlite: Place, caplog: pytest.LogCaptureFixture) -> None:
    records = night("r", champion="nobody", candidates=[])
    assert sqlite.tell("r", records) == len(records) - 1
    assert "'nobody', which was never found" in caplog.text
    assert by_name(sqlite.mlflow_runs())["r"].info.status == "FINISHED"
    assert sqlite.replay() == 0


# Reading, and where the ledger is -----------------------------------------------------------------------------------


def test_read_candidates_dead_ledgers_are_unavailable(tmp_path: Path) -> None:
    for uri in (default_tracking_uri(str(tmp_path)), f"http://127.0.0.1:{free_port()}"):
        with pytest.raises(LedgerUnavailable):
            read_candidates(uri)
        with pytest.raises(LedgerUnavailable):
            registered_fingerprints(uri)
    assert list(tmp_path.iterdir()) == []


def test_registered_fingerprints_scores_and_models_of_every_version(sqlite: Place) -> None:
    sqlite.tell("o", [opened("o")])
    assert registered_fingerprints(sqlite.uri) == set()
    sqlite.tell("a", [opened("a"), candidate("a", "student", 1000), verdict("a", "student", 1001)])
    other = [opened("b"), candidate("b", "teacher", 2000, "6" * 64), verdict("b", "teacher", 2001, "6" * 64)]
    sqlite.tell("b", other)
    assert registered_fingerprints(sqlite.uri) == {"0" * 64, "1" * 64, "5" * 64, "6" * 64}


@pytest.mark.parametrize(
    "uri", ["sqlite:///mlflow.db", "./mlruns", "file:///tmp/mlruns", "databricks", "http://", "s3://b/x"]
)
def test_check_tracking_uri_unusable_is_a_config_error(uri: str) -> None:
    with pytest.raises(ConfigError, match="tracking URI"):
        check_tracking_uri(uri)


def test_check_tracking_uri_usable_says_nothing(server_uri: str) -> None:
    for uri in (server_uri, "sqlite:////data/mlflow.db", "postgresql+psycopg2://u:p@db/mlflow"):
        check_tracking_uri(uri)


def test_default_tracking_uri_is_inside_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert default_tracking_uri("./.stillhouse") == f"sqlite:///{tmp_path}/.stillhouse/mlflow/mlflow.db"
    with pytest.raises(ConfigError, match="tracking URI"):
        default_tracking_uri("s3://bucket/store")


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
    code = "import sys, workflows.engine.ledger; print([m for m in ('mlflow', 'ray', 'torch', 'pandas') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
