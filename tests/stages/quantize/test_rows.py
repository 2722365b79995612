"""Reading the calibration split and choosing disjoint rows of it."""

from pathlib import Path

import numpy as np
import pytest

from stages.contract import Artifact
from stages.errors import StageFailed
from stages.formats.tokens import TokenRows
from stages.quantize.rows import read_distinct_rows, split_rows
from tests.stages.quantize.conftest import calibration_rows, write_shard


def as_set(rows: TokenRows) -> set[bytes]:
    return {row.tobytes() for row in rows.ids_RT}


def test_rows_of_all_shards_are_read_in_order(data: Artifact) -> None:
    rows = read_distinct_rows(data.paths("tokens/calibration-*.parquet"))
    ids, _ = calibration_rows(40)
    np.testing.assert_array_equal(rows.ids_RT, ids)
    assert rows.mask_RT[:, 1:].all()
    assert not rows.mask_RT[:, 0].any()


def test_rows_that_repeat_or_predict_nothing_are_left_out(tmp_path: Path) -> None:
    ids, masks = calibration_rows(4)
    ids[2] = ids[0]
    masks[3] = False
    write_shard(tmp_path / "a.parquet", ids, masks)
    np.testing.assert_array_equal(read_distinct_rows([tmp_path / "a.parquet"]).ids_RT, ids[:2])


def test_rows_without_shards_is_an_error() -> None:
    with pytest.raises(StageFailed, match="no calibration rows"):
        read_distinct_rows([])


def test_split_is_disjoint_and_decided_by_the_seed(data: Artifact) -> None:
    rows = read_distinct_rows(data.paths("tokens/calibration-*.parquet"))
    calibration, evaluation = split_rows(rows, calibration=24, evaluation=16, seed=5)
    assert (len(calibration), len(evaluation)) == (24, 16)
    assert not as_set(calibration) & as_set(evaluation)
    again, other = (split_rows(rows, calibration=24, evaluation=16, seed=seed)[1] for seed in (5, 6))
    np.testing.assert_array_equal(again.ids_RT, evaluation.ids_RT)
    assert as_set(other) != as_set(evaluation)
    more = split_rows(rows, calibration=8, evaluation=16, seed=5)[1]
    np.testing.assert_array_equal(more.ids_RT, evaluation.ids_RT)


def test_split_of_too_few_rows_is_cut_in_proportion_and_stays_disjoint(data: Artifact) -> None:
    rows = read_distinct_rows(data.paths("tokens/calibration-*.parquet"))
    calibration, evaluation = split_rows(rows, calibration=120, evaluation=40, seed=0)
    assert (len(calibration), len(evaluation)) == (30, 10)
    assert not {row.tobytes() for row in calibration.ids_RT} & {row.tobytes() for row in evaluation.ids_RT}


def test_split_of_one_row_says_what_is_expected(data: Artifact) -> None:
    rows = read_distinct_rows(data.paths("tokens/calibration-*.parquet")).take(np.array([0]))
    with pytest.raises(StageFailed, match="1 distinct rows, expected at least one to calibrate on and another"):
        split_rows(rows, calibration=40, evaluation=1, seed=0)
