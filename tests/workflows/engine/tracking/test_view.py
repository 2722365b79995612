"""What MLflow is told of each record."""

import math
import posixpath

import pytest

from tests.workflows.engine.tracking.nights import night, opened, step
from workflows.engine.events import StepClosed
from workflows.engine.tracking.view import Row, candidate_key, coalesce, finite, legal_name, legal_params, legal_tags


def test_coalesce_records_of_one_attempt_become_one_row() -> None:
    rows = [entry for entry in coalesce(step("r", "teacher", "Train", 100)) if isinstance(entry, Row)]
    assert [(row.key, row.name, row.opened_ms, row.closed) for row in rows] == [
        ("r/teacher/1", "teacher", 100, ("FINISHED", 190))
    ]
    assert rows[0].points == [
        ("train/loss", 5.0, 0, 100),
        ("train/loss", 4.0, 1, 101),
        ("train/loss", 3.0, 2, 102),
        ("seconds", 0.09, 0, 190),
    ]
    assert rows[0].num_records == 3


def test_coalesce_whole_run_opens_first_and_closes_last() -> None:
    entries = coalesce(night("r"))
    assert isinstance(entries[0], Row)
    assert isinstance(entries[-1], Row)
    assert (entries[0].opened_ms, entries[0].closed) == (1000, None)
    assert entries[-1].closed == ("FINISHED", 2002)
    assert sum(entry.num_records if isinstance(entry, Row) else 1 for entry in entries) == len(night("r"))


def test_coalesce_second_attempt_has_a_row_of_its_own() -> None:
    again = StepClosed("r", "teacher", 2, 300, "FAILED", {}, {}, {"error": "lost"}, "")
    rows = [entry for entry in coalesce([*step("r", "teacher", "Train", 100), again]) if isinstance(entry, Row)]
    assert [(row.name, row.closed and row.closed[0]) for row in rows] == [
        ("teacher", "FINISHED"),
        ("teacher (attempt 2)", "FAILED"),
    ]


def test_coalesce_run_tags_fill_mlflows_own_columns() -> None:
    (row,) = coalesce([opened("r")])
    assert isinstance(row, Row)
    assert row.tags["mlflow.source.git.commit"] == "abc123"
    assert row.tags["mlflow.source.name"] == "stillhouse run quickstart"


@pytest.mark.parametrize("name", ["ppl@k=5", "/a//b/", "../x", "a/./b", "é ü", "", "...", "..x", "x" * 400, "a/" * 200])
def test_legal_name_any_name_is_one_mlflow_takes(name: str) -> None:
    from mlflow.utils.validation import _validate_length_limit, _validate_metric_name, _validate_param_name

    legal = legal_name(name)
    _validate_metric_name(legal)
    _validate_param_name(legal)
    _validate_length_limit("name", 250, legal)
    assert posixpath.normpath(legal) == legal
    assert legal_name(legal) == legal


def test_legal_params_and_tags_long_values_are_cut_at_mlflows_limits() -> None:
    assert len(legal_params({"p": "x" * 7000})["p"]) == 6000
    assert len(legal_tags({"t": "x" * 9000})["t"]) == 8000


def test_finite_odd_values_become_tags() -> None:
    good, odd = finite([("a", 1.0, 0, 5), ("b", math.nan, 0, 5), ("c@", math.inf, 0, 5)])
    assert good == [("a", 1.0, 0, 5)]
    assert odd == {"not_finite.b": "nan", "not_finite.c_": "inf"}


def test_candidate_key_quote_in_name_cannot_leave_the_filter() -> None:
    assert "'" not in candidate_key("s", "x' or 'a")
    assert "`" not in candidate_key("s", "x`y")
