"""What stands in MLflow, on sqlite and through a real server, after one run, after more, and after runs that race."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.workflows.engine.tracking.nights import (
    EXPERIMENT,
    SCORES,
    candidate,
    night,
    opened,
)
from tests.workflows.engine.tracking.place import Place, as_fields, by_name
from workflows.engine.tracking.queries import read_candidates, registered_fingerprints


@pytest.mark.parametrize("place", ["sqlite", pytest.param("server", marks=pytest.mark.server)], indirect=True)
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
