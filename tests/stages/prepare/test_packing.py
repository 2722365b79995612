"""Cutting and packing: whole chats, strided windows, what is begun with, full rows, and shards of equal size."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import pytest

from stages.formats.packing import Segment, best_fit
from stages.formats.tokens import TokenRows
from stages.prepare.encoding import Encoded
from stages.prepare.packing import Cutting, Packer
from stages.prepare.stage import Overlong

BEGIN = 9
PAD = -7


def cutting(
    length: int = 16, prefix: tuple[int, ...] = (BEGIN,), overlong: Overlong = "reject", context: float = 0.5
) -> Cutting:
    return Cutting(sequence_length=length, prefix=prefix, overlong=overlong, context_fraction=context)


def text(number: int, length: int, prefix: tuple[int, ...] = (BEGIN,)) -> Encoded:
    """A document whose tokens are numbered, begun as the tokenizer begins it."""
    ids = np.array([*prefix, *range(1000 * number, 1000 * number + length)], np.int32)
    mask = np.ones(len(ids), np.bool_)
    mask[: len(prefix)] = False
    return Encoded(ids, mask, number)


def packed(segments: Sequence[Segment], *, length: int = 16, shard_tokens: int = 10**6) -> Iterator[TokenRows]:
    packer = Packer(sequence_length=length, shard_tokens=shard_tokens, pad_token_id=PAD)
    for segment in segments:
        yield from packer.add([segment])
    yield from packer.finish()


def segments_of(rows: TokenRows) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """Yield (ids, mask, document) of each segment, found by where positions restart; padding has the document −1."""
    for ids, owners, mask, positions in zip(
        rows.ids_RT, rows.document_ids_RT, rows.mask_RT, rows.positions_RT, strict=True
    ):
        starts = [*np.flatnonzero(positions == 0), len(positions)]
        for start, stop in pairwise(starts):
            assert positions[start:stop].tolist() == list(range(stop - start))
            (owner,) = set(owners[start:stop].tolist())
            yield ids[start:stop], mask[start:stop], owner


def test_document_that_fits_is_one_segment_and_its_first_token_is_no_target() -> None:
    (begun,), (bare,) = (cutting(prefix=prefix).windows(text(1, 5, prefix)) for prefix in ((BEGIN,), ()))
    assert begun.ids.tolist() == [BEGIN, 1000, 1001, 1002, 1003, 1004]
    assert begun.mask.tolist() == [False, True, True, True, True, True]
    assert bare.mask.tolist() == [False, True, True, True, True]


@pytest.mark.parametrize("context", [0.0, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("prefix", [(), (BEGIN,), (BEGIN, BEGIN + 1)])
@pytest.mark.parametrize("length", [15, 16, 17, 31, 200])
def test_windows_score_each_token_once_with_enough_of_the_text_before_it(
    length: int, prefix: tuple[int, ...], context: float
) -> None:
    cut = cutting(prefix=prefix, context=context)
    document = text(1, length, prefix)
    windows = cut.windows(document)
    targets = [int(token) for window in windows for token in window.ids[window.mask]]
    assert targets == list(range(1000 + (not prefix), 1000 + length))
    room = cut.sequence_length - len(prefix)
    for number, window in enumerate(windows):
        assert len(window.ids) <= cut.sequence_length
        assert tuple(window.ids[: len(prefix)].tolist()) == prefix
        assert not window.mask[: max(1, len(prefix))].any()
        body = window.ids[len(prefix) :]
        assert (np.diff(body) == 1).all(), "a window is a stretch of the text"
        if number:
            assert np.flatnonzero(window.mask)[0] - len(prefix) >= min(context * room, room - 1)


@pytest.mark.parametrize(
    ("overlong", "kept"), [("reject", []), ("truncate", [BEGIN, *range(1000, 1015)])], ids=["reject", "truncate"]
)
def test_chat_longer_than_a_row_is_left_out_or_loses_its_end(overlong: Overlong, kept: list[int]) -> None:
    found = cutting(overlong=overlong).whole(text(1, 30))
    assert [token for segment in found for token in segment.ids.tolist()] == kept
    (fits,) = cutting(overlong=overlong).whole(text(2, 15))
    assert len(fits.ids) == 16


def test_document_without_a_target_in_reach_is_no_segment() -> None:
    prompt = Encoded(np.arange(20, dtype=np.int32), np.array([False] * 19 + [True]), 7)
    assert cutting(overlong="truncate").whole(prompt) == []
    assert cutting(prefix=()).windows(text(1, 1, ())) == []


def test_rows_hold_every_segment_whole_and_padding_is_a_segment_of_its_own() -> None:
    rng = np.random.default_rng(0)
    given = [cutting().whole(text(number, int(length)))[0] for number, length in enumerate(rng.integers(2, 16, 200))]
    (rows,) = packed(given)
    found = list(segments_of(rows))
    kept = sorted((owner, tuple(ids.tolist()), tuple(mask.tolist())) for ids, mask, owner in found if owner >= 0)
    assert kept == [(each.document_id, tuple(each.ids.tolist()), tuple(each.mask.tolist())) for each in given]
    padding = [(ids, mask) for ids, mask, owner in found if owner < 0]
    assert padding
    assert all((ids == PAD).all() and not mask.any() for ids, mask in padding)


def test_no_target_is_of_a_document_that_began_in_an_earlier_row_but_in_a_window_with_its_own_context() -> None:
    rng = np.random.default_rng(1)
    cut = cutting(32)
    chats = [segment for number in range(100) for segment in cut.whole(text(number, int(rng.integers(2, 30))))]
    texts = [segment for number in range(100, 130) for segment in cut.windows(text(number, int(rng.integers(2, 200))))]
    shards = list(packed([*chats, *texts], length=32, shard_tokens=512))
    assert len(shards) > 3
    scored: list[int] = []
    for ids, mask, owner in (each for rows in shards for each in segments_of(rows)):
        if not mask.any():
            continue
        scored += ids[mask].tolist()
        whole = ids[1] == 1000 * owner
        assert ids[0] == BEGIN
        assert whole or (owner >= 100 and np.flatnonzero(mask)[0] - 1 >= 31 / 2)
    assert len(scored) == len(set(scored)) == sum(int(each.mask.sum()) for each in (*chats, *texts))


def test_shards_are_of_equal_size_and_full_and_depend_on_the_documents_alone() -> None:
    rng = np.random.default_rng(2)
    lengths = np.clip(np.exp(rng.normal(np.log(40), 0.8, 3000)), 2, 250).astype(int)
    given = [cutting(256).whole(text(number, int(length)))[0] for number, length in enumerate(lengths)]
    shards = list(packed(given, length=256, shard_tokens=4096))
    assert {len(rows) for rows in shards[:-2]} == {16}
    assert all(8 <= len(rows) <= 24 for rows in shards)
    filled = sum(int((rows.document_ids_RT >= 0).sum()) for rows in shards)
    assert filled / sum(rows.ids_RT.size for rows in shards) >= 0.97
    again = list(packed(given, length=256, shard_tokens=4096))
    assert all(np.array_equal(a.ids_RT, b.ids_RT) for a, b in zip(shards, again, strict=True))


def test_no_documents_make_no_rows() -> None:
    assert list(packed([])) == []


def test_best_fit_puts_the_longest_first_where_the_least_room_is_left() -> None:
    assert best_fit([3, 5, 2, 7, 3], 8) == [[3], [1, 0], [4, 2]]
    assert best_fit([8, 8], 8) == [[0], [1]]
    assert best_fit([], 8) == []
