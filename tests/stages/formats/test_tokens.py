"""Token shards: what is written is read again, by whole shards and by chosen rows, with the columns that are asked for."""

import hashlib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from stages.formats import tokens
from stages.formats.tokens import TokenRows

LENGTH = 8


def rows_of(num: int, seed: int = 0) -> TokenRows:
    rng = np.random.default_rng(seed)
    mask_RT = rng.random((num, LENGTH)) < 0.7
    mask_RT[:, 0] = False
    owners_RT = rng.integers(-(2**62), 2**62, (num, LENGTH))
    positions_RT = np.tile(np.array([0, 1, 2, 0, 1, 0, 1, 2], np.int32), (num, 1))
    return TokenRows(rng.integers(0, 1000, (num, LENGTH), dtype=np.int32), owners_RT, mask_RT, positions_RT)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("shards")
    found = []
    for index, num in enumerate((5, 1, 4)):
        found.append(folder / Path(tokens.shard_name("train", index)).name)
        found[-1].write_bytes(tokens.to_parquet(rows_of(num, index)))
    return found


def test_shard_that_was_written_is_read_as_the_same_rows(paths: list[Path]) -> None:
    found, expected = tokens.read_rows(paths[:1]), rows_of(5)
    np.testing.assert_array_equal(found.ids_RT, expected.ids_RT)
    np.testing.assert_array_equal(found.document_ids_RT, expected.document_ids_RT)
    np.testing.assert_array_equal(found.mask_RT, expected.mask_RT)
    np.testing.assert_array_equal(found.positions_RT, expected.positions_RT)
    columns = (found.ids_RT, found.document_ids_RT, found.mask_RT, found.positions_RT)
    assert [column.dtype for column in columns] == [np.int32, np.int64, np.bool_, np.int32]
    pairs = zip(expected.ids_RT.astype("<i4"), expected.positions_RT.astype("<i4"), strict=True)
    assert found.digests == [hashlib.sha256(a.tobytes() + b.tobytes()).digest()[:16] for a, b in pairs]


def test_rows_that_are_cut_into_other_segments_have_other_digests() -> None:
    one = rows_of(1)
    whole = np.arange(LENGTH, dtype=np.int32)[None]
    assert tokens.row_digests(one.ids_RT, one.positions_RT) != tokens.row_digests(one.ids_RT, whole)


def test_rows_that_are_written_without_positions_are_one_segment_each(tmp_path: Path) -> None:
    given = rows_of(2)
    (tmp_path / "a.parquet").write_bytes(
        tokens.to_parquet(TokenRows(given.ids_RT, given.document_ids_RT, given.mask_RT))
    )
    assert tokens.read_rows([tmp_path / "a.parquet"]).positions_RT.tolist() == [list(range(LENGTH))] * 2


def test_shard_has_the_agreed_columns(paths: list[Path]) -> None:
    assert [f"{field.name}: {field.type}" for field in pq.read_schema(paths[0])] == [
        "digest: fixed_size_binary[16]",
        "input_ids: fixed_size_list<element: int32>[8]",
        "positions: fixed_size_list<element: int32>[8]",
        "document_ids: fixed_size_list<element: int64>[8]",
        "loss_mask: fixed_size_list<element: bool>[8]",
    ]


def test_equal_rows_give_equal_bytes() -> None:
    assert tokens.to_parquet(rows_of(3)) == tokens.to_parquet(rows_of(3))


def test_columns_that_are_not_asked_for_are_empty(paths: list[Path]) -> None:
    found = tokens.read_rows(paths, ("loss_mask",))
    assert found.ids_RT.shape == found.mask_RT.shape == (10, LENGTH)
    assert found.document_ids_RT.shape == (10, 0)
    assert not found.digests


def test_no_shards_hold_no_rows() -> None:
    assert len(tokens.read_rows([])) == 0
    assert tokens.num_rows([]) == 0


@pytest.mark.parametrize("rows_per_batch", [1, 3, 10, 64])
def test_batches_hold_every_row_once_in_order_whatever_their_size(paths: list[Path], rows_per_batch: int) -> None:
    batches = list(tokens.read_batches(paths, np.arange(10), rows_per_batch=rows_per_batch))
    assert all(len(batch) == rows_per_batch for batch in batches[:-1])
    whole = tokens.read_rows(paths)
    np.testing.assert_array_equal(np.concatenate([batch.ids_RT for batch in batches]), whole.ids_RT)
    assert [digest for batch in batches for digest in batch.digests] == whole.digests


def test_batches_of_chosen_rows_cross_shards(paths: list[Path]) -> None:
    chosen = np.array([1, 4, 5, 9])
    batches = list(tokens.read_batches(paths, chosen, rows_per_batch=3, columns=("document_ids",)))
    assert [len(batch) for batch in batches] == [3, 1]
    owners = np.concatenate([batch.document_ids_RT for batch in batches])
    np.testing.assert_array_equal(owners, tokens.read_rows(paths).document_ids_RT[chosen])


def test_rows_are_counted_over_shards(paths: list[Path]) -> None:
    assert tokens.num_rows(paths) == 10


@pytest.mark.parametrize("indices", [np.array([2, 0]), slice(1, 3)], ids=["places", "slice"])
def test_taken_rows_keep_every_column(paths: list[Path], indices: "np.ndarray | slice") -> None:
    whole = tokens.read_rows(paths)
    taken = whole.take(indices)
    np.testing.assert_array_equal(taken.ids_RT, whole.ids_RT[indices])
    np.testing.assert_array_equal(taken.mask_RT, whole.mask_RT[indices])
    assert taken.digests == tokens.row_digests(taken.ids_RT, taken.positions_RT)


def test_position_predicts_where_its_successor_is_a_target() -> None:
    mask = np.array([[False, True, False, True], [False, False, True, True]])
    assert tokens.predicts(mask).tolist() == [[True, False, True, False], [False, True, True, False]]
    assert tokens.predicts(np.ones((2, 3), bool))[:, -1].tolist() == [False, False]
