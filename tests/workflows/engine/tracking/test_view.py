"""What MLflow shows of a run's events."""

import math
import posixpath
from typing import Any

import pytest

from tests.workflows.engine.tracking.nights import SCORES, candidate, ended, judged, night, started, step
from workflows.engine.tracking.view import fold, legal_name


def test_fold_events_of_one_attempt_become_one_row() -> None:
    _, row = fold([started("r"), *step("teacher", "Train", 100)]).rows
    assert (row.key, row.parent, row.name, row.started_ms) == ("r/teacher/1", "r", "teacher", 100)
    assert (row.status, row.ended_ms) == ("FINISHED", 190)
    assert row.points == [
        ("train/loss", 5.0, 0, 100),
        ("train/loss", 4.0, 1, 101),
        ("train/loss", 3.0, 2, 102),
        ("seconds", 0.09, 0, 190),
    ]
    assert (row.params, row.texts) == ({"seed": "0"}, {"config.json": '{\n "seed": 0\n}'})


def test_fold_whole_run_is_a_row_for_each_step_and_its_candidates() -> None:
    view = fold(night("r"))
    assert [(row.name, row.status) for row in view.rows] == [
        (name, "FINISHED") for name in ("r", "corpus", "teacher", "signals", "train.small", "quantize")
    ]
    assert (view.rows[0].started_ms, view.rows[0].ended_ms) == (1000, 2002)
    assert view.rows[0].tags["verdict"] == "champion: student-w8a8"
    assert [found.name for found in view.candidates] == ["teacher", "student", "student-w8a8", "student-w4a16"]
    (wish,) = [found for found in view.candidates if found.registered_name is not None]
    assert (wish.registered_name, wish.key, wish.started_ms) == ("llama-6l", f"{SCORES}/student-w8a8", 2000)


def test_fold_run_in_its_midst_leaves_open_what_is_open() -> None:
    events = [started("r"), *step("teacher", "Train", 100)[:2]]
    assert [row.status for row in fold(events).rows] == ["RUNNING", "RUNNING"]
    assert [(row.status, row.ended_ms) for row in fold(events, over=True).rows] == [("KILLED", 1000), ("KILLED", 1000)]


def test_fold_again_gives_equal_rows_and_more_events_other_ones() -> None:
    events = [started("r"), *step("teacher", "Train", 100)]
    once, again, less = fold(events), fold(events), fold(events[:-1])
    assert once == again
    assert once.rows[1] != less.rows[1]
    assert once.rows[0] == less.rows[0]


def test_fold_second_attempt_has_a_row_of_its_own() -> None:
    begin = step("teacher", "Train", 100)[0].model_copy(update={"attempt": 2})
    failed = ended("teacher", 2, 300, "FAILED", tags={"error": "lost"})
    view = fold([started("r"), *step("teacher", "Train", 100), begin, failed])
    assert [(row.name, row.status) for row in view.rows[1:]] == [
        ("teacher", "FINISHED"),
        ("teacher (attempt 2)", "FAILED"),
    ]


def test_fold_run_tags_fill_mlflows_own_columns() -> None:
    (row,) = fold([started("r")]).rows
    assert row.tags["mlflow.source.git.commit"] == "abc123"
    assert row.tags["mlflow.source.name"] == "stillhouse run quickstart"
    assert row.tags["mlflow.user"] == "me"


def test_fold_rejecting_verdict_registers_nothing() -> None:
    view = fold([started("r"), judged(candidate("student"), at_ms=1000)])
    assert [found.registered_name for found in view.candidates] == [None]
    assert view.rows[0].tags["verdict"] == "rejected"


@pytest.mark.parametrize("events", [[], night("r")[1:]], ids=["none", "without its start"])
def test_fold_run_without_its_start_is_an_error(events: list[Any]) -> None:
    with pytest.raises(ValueError, match="how the run began"):
        fold(events)


@pytest.mark.parametrize("name", ["ppl@k=5", "/a//b/", "../x", "a/./b", "é ü", "", "...", "..x", "x" * 400, "a/" * 200])
def test_legal_name_any_name_is_one_mlflow_takes(name: str) -> None:
    from mlflow.utils.validation import _validate_length_limit, _validate_metric_name, _validate_param_name

    legal = legal_name(name)
    _validate_metric_name(legal)
    _validate_param_name(legal)
    _validate_length_limit("name", 250, legal)
    assert posixpath.normpath(legal) == legal
    assert legal_name(legal) == legal


def test_fold_long_values_are_cut_at_mlflows_limits() -> None:
    begin = started("r").model_copy(update={"params": {"p": "x" * 7000}})
    failed = ended("teacher", 1, 200, "FAILED", tags={"error": "x" * 9000})
    top, row = fold([begin, step("teacher", "Train", 100)[0], failed]).rows
    assert (len(top.params["p"]), len(row.tags["error"])) == (6000, 8000)


def test_fold_step_params_are_the_fields_of_its_config_that_fit_a_cell() -> None:
    config = {"seed": 0, "on": True, "name": "x" * 99, "none": None, "nested": {"a": 1}, "many": [1]}
    config |= {f"field{k}": k for k in range(20)}
    begin = step("teacher", "Train", 100)[0].model_copy(update={"config": config})
    params = fold([started("r"), begin]).rows[1].params
    assert {"seed": "0", "on": "True", "name": "x" * 60, "field0": "0"}.items() <= params.items()
    assert len(params) == 12
    assert not {"none", "nested", "many"} & set(params)


def test_fold_values_that_are_not_finite_become_tags() -> None:
    metrics = {"a": 1.0, "b": math.nan, "c@": math.inf}
    row = fold([started("r"), step("s", "Train", 100)[0], ended("s", 1, 200, metrics=metrics)]).rows[1]
    assert row.points == [("a", 1.0, 0, 200)]
    assert {name: row.tags[name] for name in row.tags if "finite" in name} == {
        "not_finite.b": "nan",
        "not_finite.c_": "inf",
    }
    found = candidate("student").model_copy(update={"metrics": metrics})
    (shown,) = fold([started("r"), judged(found, at_ms=1000)]).candidates
    assert (shown.points, shown.tags["not_finite.b"]) == ([("a", 1.0, 0, 1000)], "nan")


def test_fold_quote_in_a_candidates_name_cannot_leave_the_filter() -> None:
    found = candidate("student").model_copy(update={"name": "x' or `a"})
    (shown,) = fold([started("r"), judged(found, at_ms=1000)]).candidates
    assert not {"'", "`"} & set(shown.key)
