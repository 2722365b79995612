"""What stands in MLflow, on sqlite and through a real server, after one run, after more, and after runs that race."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.stages.promote.made_up import Made
from tests.workflows.engine.tracking.nights import (
    EXPERIMENT,
    SCORES,
    candidate,
    judged,
    night,
    started,
    step,
)
from tests.workflows.engine.tracking.place import Place, by_name
from tests.workflows.engine.tracking.test_champion import keep_scores
from workflows.engine.events import CurvePoints
from workflows.engine.tracking.mlflow_store import MlflowStore
from workflows.engine.tracking.queries import query_candidates, registered_fingerprints
from workflows.engine.tracking.tracking_uri import check_tracking_uri
from workflows.engine.tracking.view import fold


@pytest.mark.parametrize("place", ["sqlite", pytest.param("server", marks=pytest.mark.server)], indirect=True)
def test_publish_two_nights_stand_in_mlflow_as_described(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "leaderboard.md").write_text("| candidate |")
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    tracker = place.tracker("night-1")
    for event in night("night-1", files=(tmp_path / "leaderboard.md", tmp_path / "lost.png")):
        tracker.record(event)
    state = tracker.close(60)
    assert (state.waiting, state.error) == (0, None)

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
        Path(client.download_artifacts(teacher.info.run_id, "config.json", str(tmp_path))).read_text()
        == '{\n "seed": 0\n}'
    )
    assert (rows["corpus"].data.tags["cache"], rows["corpus"].data.tags["made_by_run"]) == ("hit", "an-earlier-run")
    assert_candidates_stand(place, ["night-1"])
    assert_champion(place, {"1": "student-w8a8"}, "1")

    assert place.publish("night-2", night("night-2", at_ms=900_000)) == ["night-2"]
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
    found = query_candidates(place.uri, run_ids=nights[:1])
    assert [(c["name"], c["scores"], c["runs"]) for c in found] == [
        (row.info.run_name, SCORES, nights) for row in sorted(rows, key=lambda row: str(row.info.run_name))
    ]
    columns = json.loads(experiment.tags["mlflow.sharedViewState.candidates"])["selectedColumns"]
    assert {f"metrics.`{name}`" for name in found[0]["metrics"]} <= set(columns)
    assert found[0]["metrics"] == {"final/kl_to_teacher": 0.21, "final/size_bytes": 1e6, "final/latency_p50_ms": 3.5}
    assert query_candidates(place.uri, run_ids=["another"]) == []


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
    sqlite.publish("a", night("a", champion=None))
    assert sqlite.client.search_registered_models() == []
    sqlite.publish("b", night("b", at_ms=50_000))
    sqlite.publish("c", night("c", at_ms=90_000, champion=None))
    assert_champion(sqlite, {"1": "student-w8a8"}, "1")
    assert by_name(sqlite.mlflow_runs())["c"].data.tags["verdict"] == "rejected"


def test_verdict_new_champion_remembers_the_one_it_replaced(sqlite: Place) -> None:
    keep_scores(sqlite.folder, SCORES, {"student-w8a8": Made(0.1), "student-w4a16": Made(0.1, size_bytes=1_000_000)})
    sqlite.publish("a", night("a"))
    sqlite.publish("b", night("b", at_ms=50_000, champion="student-w4a16"))
    assert_champion(sqlite, {"1": "student-w8a8", "2": "student-w4a16"}, "2")
    assert sqlite.client.get_model_version("llama-6l", "2").tags["replaced_version"] == "1"


def test_verdict_worse_later_candidate_leaves_the_alias_where_it_is(sqlite: Place) -> None:
    keep_scores(sqlite.folder, SCORES, {"student-w8a8": Made(0.1), "student": Made(0.2, size_bytes=9_000_000)})
    sqlite.publish("a", night("a"))
    sqlite.publish("b", night("b", at_ms=50_000, champion="student"))
    assert_champion(sqlite, {"1": "student-w8a8", "2": "student"}, "1")
    tags = sqlite.client.get_model_version("llama-6l", "2").tags
    assert tags["challenge"].startswith("student is not smaller than the champion")
    assert "replaced_version" not in tags


def test_verdict_champion_without_a_record_keeps_its_alias(sqlite: Place) -> None:
    sqlite.publish("a", night("a"))
    sqlite.publish("b", night("b", at_ms=50_000, champion="student-w4a16"))
    assert_champion(sqlite, {"1": "student-w8a8", "2": "student-w4a16"}, "1")


def test_verdict_published_late_does_not_move_the_alias_back(sqlite: Place) -> None:
    sqlite.publish("b", night("b", at_ms=50_000, champion="student-w4a16"))
    sqlite.publish("a", night("a", at_ms=1000))
    assert_champion(sqlite, {"1": "student-w4a16", "2": "student-w8a8"}, "1")
    assert {row.data.tags["run"] for row in sqlite.mlflow_runs("tags.kind = 'candidate'")} == {"b"}


def test_candidate_measured_anew_shows_the_new_figure_once(sqlite: Place) -> None:
    sqlite.publish("a", [started("a"), judged(candidate("student"), at_ms=1000)])
    sqlite.publish("b", [started("b"), judged(candidate("student", latency_p50_ms=2.5), at_ms=2000)])
    (row,) = sqlite.mlflow_runs("tags.kind = 'candidate'")
    history = {key: sqlite.client.get_metric_history(row.info.run_id, key) for key in row.data.metrics}
    assert [point.value for point in history["final/latency_p50_ms"]] == [3.5, 2.5]
    assert [point.value for point in history["final/kl_to_teacher"]] == [0.21]


def test_publish_runs_that_end_at_once_share_their_candidates(sqlite: Place) -> None:
    nights = [f"night-{index}" for index in range(3)]
    trackers = [sqlite.tracker(run) for run in nights]
    for index, (tracker, run) in enumerate(zip(trackers, nights, strict=True)):
        for event in night(run, at_ms=1000 + index, steps=0):
            tracker.record(event)
    with ThreadPoolExecutor() as pool:
        states = list(pool.map(lambda tracker: tracker.close(90), trackers))
    assert [(state.waiting, state.error) for state in states] == [(0, None)] * 3
    rows = sqlite.mlflow_runs("tags.kind = 'candidate'")
    assert len(rows) == 4
    for row in rows:
        history = sqlite.client.get_metric_history(row.info.run_id, "final/kl_to_teacher")
        assert (len(history), len(row.outputs.model_outputs)) == (1, 1)
    assert {tuple(found["runs"]) for found in query_candidates(sqlite.uri)} == {tuple(nights)}
    assert len(sqlite.client.search_model_versions("name = 'llama-6l'")) == 1


# A server whose disk is not ours ------------------------------------------------------------------------------------


@pytest.mark.server
def test_publish_to_a_server_without_a_proxy_writes_nothing_below_its_path(
    server_without_proxy: tuple[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    uri, root = server_without_proxy
    place = Place(tmp_path, uri)
    (tmp_path / "leaderboard.md").write_text("| candidate |")
    told = check_tracking_uri(uri, EXPERIMENT)
    assert f"at {root.as_uri()}, a path of its own disk" in told
    for run, said, at_ms in (("night-1", "", 1000), ("night-2", told, 50_000)):
        tracker = place.tracker(run, warned=said)
        for event in night(run, at_ms=at_ms, files=(tmp_path / "leaderboard.md",)):
            tracker.record(event)
        state = tracker.close(60)
        assert (state.waiting, state.error) == (0, None)
        assert caplog.messages == [told]  # once a run, and not again where it was said before
    assert not root.exists()
    run, teacher = (
        by_name(place.mlflow_runs(f"tags.kind = '{kind}' and tags.`stillhouse.run` = 'night-1'"))[name]
        for kind, name in (("workflow", "night-1"), ("step", "teacher"))
    )
    assert run.data.tags["mlflow.note.content"] == f"**finished**: all is well\n\n{told}"
    assert teacher.data.tags["mlflow.note.content"] == told
    assert (teacher.data.metrics["train/loss"], teacher.data.params["seed"]) == (3.0, "0")
    assert len(query_candidates(uri)) == 4
    assert_champion(place, {"1": "student-w8a8"}, "1")
    before = place.picture()
    store, _ = counting_store(place)
    store.publish(fold(night("night-1", files=(tmp_path / "leaderboard.md",))))
    assert place.picture() == before
    assert not root.exists()


# What is sent -------------------------------------------------------------------------------------------------------


class Counting:
    """A client that remembers what it was asked."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self.points: list[int] = []
        self.calls: list[str] = []
        self.lost: dict[str, int] = {}
        """Method → which of its next calls is done, but its answer lost."""

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(name)
            self.points.append(len(kwargs.get("metrics", ())))
            result = method(*args, **kwargs)
            self.lost[name] = self.lost.get(name, 0) - 1
            if self.lost[name] == 0:
                raise ConnectionError("the answer is lost")
            return result

        return call


def counting_store(place: Place) -> tuple[MlflowStore, Counting]:
    client = Counting(place.client)
    return MlflowStore(place.uri, str(place.folder / "mlflow/artifacts"), lambda _: client), client


def test_publish_growing_run_sends_only_what_is_new(sqlite: Place) -> None:
    store, client = counting_store(sqlite)
    begin, curves, end = step("teacher", "Train", 1200)
    store.publish(fold([started("r"), begin, curves]))
    assert sum(client.points) == 3
    client.calls.clear()
    store.publish(fold([started("r"), begin, curves]))
    assert client.calls == []
    more = CurvePoints(step="teacher", attempt=1, points=(("train/loss", 1.0, 3, 1203),))
    store.publish(fold([started("r"), begin, curves, more, end]))
    assert sum(client.points) == 3 + 2
    history = sqlite.client.get_metric_history(by_name(sqlite.mlflow_runs())["teacher"].info.run_id, "train/loss")
    assert [point.value for point in history] == [5.0, 4.0, 3.0, 1.0]


@pytest.mark.parametrize("method", ["log_batch", "create_run", "set_terminated"])
def test_publish_answer_that_was_lost_sends_again_only_what_is_uncertain(sqlite: Place, method: str) -> None:
    store, client = counting_store(sqlite)
    points = tuple(("train/loss", float(k), k, 1000 + k) for k in range(2500))
    begin, _, end = step("teacher", "Train", 1000)
    events = [started("r"), begin, CurvePoints(step="teacher", attempt=1, points=points)]
    store.publish(fold(events))
    client.points.clear()
    events += [CurvePoints(step="teacher", attempt=1, points=(("train/loss", 9.0, 2500, 9000),)), end]
    events += step("student", "Train", 9000)
    client.lost[method] = 1
    with pytest.raises(ConnectionError):
        store.publish(fold(events))
    store.publish(fold(events))
    assert sum(client.points) <= 2 * (2 + 4)
    rows = sqlite.mlflow_runs()
    assert sorted(str(row.info.run_name) for row in rows) == ["r", "student", "teacher"]
    history = sqlite.client.get_metric_history(by_name(rows)["teacher"].info.run_id, "train/loss")
    assert len(history) == 2501


def test_publish_many_points_one_lost_answer_sends_one_request_again(sqlite: Place) -> None:
    store, client = counting_store(sqlite)
    points = tuple(("train/loss", float(k), k, 1000 + k) for k in range(2500))
    events = [started("r"), step("teacher", "Train", 1000)[0], CurvePoints(step="teacher", attempt=1, points=points)]
    client.lost["log_batch"] = 3
    with pytest.raises(ConnectionError):
        store.publish(fold(events))
    store.publish(fold(events))
    assert sum(client.points) <= 2500 + 800


def test_publish_finished_run_again_in_a_new_process_only_looks(sqlite: Place) -> None:
    sqlite.publish("r", night("r", candidates=[], champion=None))
    before = sqlite.picture()
    store, client = counting_store(sqlite)
    store.publish(fold(night("r", candidates=[], champion=None)))
    assert set(client.calls) == {"get_experiment_by_name", "search_runs"}
    assert sqlite.picture() == before


def test_publish_many_points_in_one_go_all_stand_in_mlflow(sqlite: Place) -> None:
    points = tuple(("train/loss", float(k), k, 1000 + k) for k in range(2500))
    begin, _, end = step("teacher", "Train", 1000)
    store, client = counting_store(sqlite)
    store.publish(fold([started("r"), begin, CurvePoints(step="teacher", attempt=1, points=points), end]))
    assert max(client.points) <= 1000
    row = by_name(sqlite.mlflow_runs())["teacher"]
    assert len(sqlite.client.get_metric_history(row.info.run_id, "train/loss")) == 2500
