"""Reading packed rows: order, batches over shard borders, and drawn rows."""

import numpy as np
import pytest

from stages.evaluate.rows import choose_rows, count_rows, read_batches
from tests.stages.evaluate.tiny import make_dataset


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"), rows=(5, 1, 4)).paths("tokens/validation-*.parquet")


def read_all(paths, chosen, rows_per_batch):
    batches = list(read_batches(paths, chosen, rows_per_batch=rows_per_batch))
    return [len(b.input_ids_BT) for b in batches], np.concatenate([b.input_ids_BT for b in batches])


@pytest.mark.parametrize("rows_per_batch", [1, 3, 10, 64])
def test_batches_hold_every_row_once_in_order_whatever_their_size(paths, rows_per_batch):
    _, expected = read_all(paths, np.arange(10), 1)
    sizes, rows = read_all(paths, np.arange(10), rows_per_batch)
    assert (rows == expected).all()
    assert all(size == rows_per_batch for size in sizes[:-1])


def test_batches_of_chosen_rows_cross_shards(paths):
    _, everything = read_all(paths, np.arange(10), 4)
    sizes, rows = read_all(paths, np.array([1, 4, 5, 9]), 3)
    assert sizes == [3, 1]
    assert (rows == everything[[1, 4, 5, 9]]).all()


def test_rows_are_drawn_by_seed_without_replacement(paths):
    assert count_rows(paths) == 10
    drawn = choose_rows(1000, max_rows=100, seed=1)
    assert len(set(drawn)) == 100
    assert (np.diff(drawn) > 0).all()
    assert (drawn == choose_rows(1000, max_rows=100, seed=1)).all()
    assert (drawn != choose_rows(1000, max_rows=100, seed=2)).any()
    assert choose_rows(10, max_rows=None, seed=1).tolist() == list(range(10))
