"""Reading the calibration split and choosing rows of different documents of it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from stages.contract import Artifact
from stages.errors import StageFailed
from stages.formats.packing import Segment, pack_rows, segments_of
from stages.formats.tokens import TokenRows
from stages.quantize.rows import num_distinct, num_filled, num_measured, read_distinct_rows, split_rows
from tests.stages.quantize.conftest import SEQUENCE, calibration_rows, write_shard


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


def places(num: int) -> np.ndarray:
    return np.tile(np.arange(SEQUENCE, dtype=np.int32), (num, 1))


def documents(rows: TokenRows) -> set[int]:
    return set(rows.document_ids_RT[rows.document_ids_RT >= 0].tolist())


def split(rows: TokenRows, calibration_rows: int, evaluation_rows: int, seed: int) -> tuple[TokenRows, TokenRows]:
    """Split rows of which each has 32 tokens, and 31 that are predicted."""
    tokens = {"calibration_tokens": SEQUENCE * calibration_rows, "evaluation_tokens": (SEQUENCE - 1) * evaluation_rows}
    return split_rows(rows, **tokens, seed=seed)


def test_split_is_of_other_documents_and_decided_by_the_seed(data: Artifact) -> None:
    rows = read_distinct_rows(data.paths("tokens/calibration-*.parquet"))
    calibration, evaluation = split(rows, 16, 10, seed=5)
    assert (len(calibration), len(evaluation)) == (16, 10)
    assert (num_filled(calibration), num_measured(evaluation)) == (16 * 32, 10 * 31)
    assert not as_set(calibration) & as_set(evaluation)
    assert not documents(calibration) & documents(evaluation)
    again, other = (split(rows, 16, 10, seed=seed)[1] for seed in (5, 6))
    np.testing.assert_array_equal(again.ids_RT, evaluation.ids_RT)
    assert as_set(other) != as_set(evaluation)
    more = split(rows, 8, 10, seed=5)[1]
    np.testing.assert_array_equal(more.ids_RT, evaluation.ids_RT)


def test_split_of_too_few_rows_is_cut_in_proportion_and_stays_disjoint(data: Artifact) -> None:
    rows = read_distinct_rows(data.paths("tokens/calibration-*.parquet"))
    calibration, evaluation = split(rows, 120, 40, seed=0)
    assert (len(calibration), len(evaluation)) == (30, 10)
    assert not as_set(calibration) & as_set(evaluation)


@pytest.mark.parametrize("seed", range(5))
def test_split_keeps_rows_that_share_documents_on_one_side(seed: int) -> None:
    """Windows of long texts lie in several rows, and the last one beside other documents."""
    ids, masks = calibration_rows(60)
    rng = np.random.default_rng(seed)
    long_ones = np.repeat(rng.integers(0, 20, 60), SEQUENCE).reshape(60, SEQUENCE)
    owners = np.where(np.arange(SEQUENCE) < 20, long_ones, rng.integers(100, 140, (60, 1)))
    owners[::3, 20:] = -1
    places = np.concatenate([np.arange(20), np.arange(12)]).astype(np.int32)
    masks[:, 20] = False
    rows = TokenRows(ids, owners, masks & (owners >= 0), np.tile(places, (60, 1)))
    calibration, evaluation = split(rows, 30, 10, seed)
    assert not documents(calibration) & documents(evaluation)
    goal = min(310, num_measured(rows) * 310 // (960 + 310))
    assert goal <= num_measured(evaluation) < goal + 20
    assert num_filled(calibration) + num_filled(evaluation) <= num_filled(rows)
    assert num_filled(calibration) > 2 * num_filled(evaluation)


def test_split_of_a_long_document_takes_no_more_of_it_than_is_asked_for() -> None:
    ids, masks = calibration_rows(60)
    owners = np.repeat(np.where(np.arange(60) < 30, 1, 2), SEQUENCE).reshape(60, SEQUENCE)
    calibration, evaluation = split(TokenRows(ids, owners, masks, places(60)), 4, 3, seed=0)
    assert (len(calibration), len(evaluation)) == (4, 3)
    assert not documents(calibration) & documents(evaluation)


def packed_chats(num: int, length: int, row: int) -> TokenRows:
    """Chats of random tokens, packed in order."""
    ids = np.random.default_rng(0).integers(1, 10**6, (num, length), dtype=np.int32)
    mask = np.arange(length) > 0
    chats = [Segment(ids[i], mask, i) for i in range(num)]
    fits = row // length
    return pack_rows([chats[i : i + fits] for i in range(0, num, fits)], length=row, pad_token_id=7)


@pytest.mark.parametrize("num", [2, 5, 13, 15, 40])
@pytest.mark.parametrize("seed", range(3))
def test_split_of_few_chats_that_share_rows_keeps_the_proportion(num: int, seed: int) -> None:
    rows = packed_chats(num, 150, 2048)
    calibration, evaluation = split_rows(rows, calibration_tokens=262_144, evaluation_tokens=65_536, seed=seed)
    measured = max(1, -(-num // 5))
    assert num_measured(evaluation) == 149 * measured
    assert num_filled(calibration) == num_distinct(calibration) == 150 * (num - measured)
    assert not documents(calibration) & documents(evaluation)
    for found in (calibration, evaluation):
        assert found.ids_RT.shape == (-(-len(documents(found)) // 13), 2048)
        assert (found.ids_RT[found.document_ids_RT < 0] == 7).all()
        for segment in segments_of(found):
            assert segment.ids.tobytes() == rows.ids_RT[rows.document_ids_RT == segment.document_id].tobytes()
            assert segment.mask.tolist() == [False] + [True] * 149


def test_split_leaves_out_segments_that_occur_under_another_document() -> None:
    rows = packed_chats(8, 16, 64)
    rows.ids_RT[1] = rows.ids_RT[0]
    calibration, evaluation = split_rows(rows, calibration_tokens=1000, evaluation_tokens=1000, seed=0)
    assert len(documents(calibration) | documents(evaluation)) == 4


def test_tokens_that_windows_repeat_are_counted_once() -> None:
    """A text of 40 tokens in windows of 16, of which the first token is the tokenizer's and half is context."""
    tokens, segments = np.arange(40, dtype=np.int32), []
    for start, stop, context in ((0, 15, 0), (7, 22, 8), (14, 29, 8), (21, 36, 8), (28, 40, 8)):
        ids = np.concatenate([[99], tokens[start:stop]]).astype(np.int32)
        segments.append(Segment(ids, np.arange(len(ids)) > context, 5))
    rows = pack_rows([[segment] for segment in reversed(segments)], length=16, pad_token_id=0)
    assert num_filled(rows) == 77
    assert num_distinct(rows) == 41


def test_split_of_rows_of_one_document_says_what_is_expected(data: Artifact) -> None:
    rows = read_distinct_rows(data.paths("tokens/calibration-*.parquet"))
    with pytest.raises(StageFailed, match="1 distinct documents in 1 distinct rows"):
        split(rows.take(np.array([0])), 40, 1, seed=0)
    with pytest.raises(StageFailed, match="1 distinct documents in 40 distinct rows"):
        split(replace(rows, document_ids_RT=np.zeros_like(rows.document_ids_RT)), 40, 1, seed=0)
