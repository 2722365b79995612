"""Which rows are scored."""

import numpy as np
import pytest

from stages.errors import StageFailed
from stages.evaluate.rows import choose_rows, rows_of_split
from tests.stages.evaluate.tiny import make_dataset


def test_rows_are_drawn_by_seed_without_replacement():
    drawn = choose_rows(1000, max_rows=100, seed=1)
    assert len(set(drawn)) == 100
    assert (np.diff(drawn) > 0).all()
    assert (drawn == choose_rows(1000, max_rows=100, seed=1)).all()
    assert (drawn != choose_rows(1000, max_rows=100, seed=2)).any()
    assert choose_rows(10, max_rows=None, seed=1).tolist() == list(range(10))


def test_rows_of_split_are_counted_over_its_shards(tmp_path):
    paths, rows = rows_of_split(make_dataset(tmp_path, rows=(5, 1, 4)), "validation", max_rows=None, seed=0)
    assert [path.name for path in paths] == [f"validation-0000{part}-00000.parquet" for part in range(3)]
    assert rows.tolist() == list(range(10))


def test_rows_of_a_split_that_is_not_there_are_refused(tmp_path):
    with pytest.raises(StageFailed, match="the dataset has no split 'calibration'"):
        rows_of_split(make_dataset(tmp_path), "calibration", max_rows=None, seed=0)
