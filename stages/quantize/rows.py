"""Rows of the calibration split, and a seeded choice of some to calibrate on and of others to measure on.

Promises: no document has tokens in both sets, and no segment is in both, not even as a duplicate under another
document; two documents suffice; the same seed gives the same rows, wherever the shards lie.

Shapes: R rows, S segments.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.errors import StageFailed
from stages.formats.packing import Segment, best_fit, pack_rows, segments_of
from stages.formats.tokens import TokenRows, predicts, read_rows

__all__ = ["num_distinct", "num_filled", "num_measured", "read_distinct_rows", "split_rows"]


def read_distinct_rows(paths: Iterable[Path]) -> TokenRows:
    """Read token shards; a row that occurs twice (by its digest), or predicts nothing, is left out.

    Raises:
        StageFailed: there is no row to read.
    """
    rows = read_rows(paths)
    if not len(rows):
        raise StageFailed(
            "the dataset has no calibration rows (tokens/calibration-*.parquet); give `Prepare` more documents"
        )
    first = {digest: index for index, digest in reversed(list(enumerate(rows.digests)))}
    predicts_RT = predicts(rows.mask_RT)
    return rows.take(np.array(sorted(index for index in first.values() if predicts_RT[index].any()), dtype=np.int64))


def num_filled(rows: TokenRows) -> int:
    """Return the tokens that are not padding."""
    return int((rows.document_ids_RT >= 0).sum())


def num_distinct(rows: TokenRows) -> int:
    """Return the tokens that are not padding, without what windows of a text repeat of the one before."""
    segments = list(segments_of(rows))
    # Of a window all but its targets is repeated, or what the tokenizer puts first; a text's first has the least of it.
    before: dict[int, int] = {}
    for segment in segments:
        context = int((~segment.mask).sum())
        before[segment.document_id] = min(before.get(segment.document_id, context), context)
    return sum(before.values()) + sum(int(segment.mask.sum()) for segment in segments)


def num_measured(rows: TokenRows) -> int:
    """Return the tokens whose prediction is measured."""
    return int(predicts(rows.mask_RT).sum())


def split_rows(
    rows: TokenRows, *, calibration_tokens: int, evaluation_tokens: int, seed: int
) -> tuple[TokenRows, TokenRows]:
    """Choose documents to calibrate on, and others to measure on, and pack each set into rows of its own.

    Of too few both sets are cut in the same proportion, as far as whole documents allow. Rows of a split are not kept:
    short documents share one, and so few of them would be on one side.

    Args:
        rows: what there is, with positions.
        calibration_tokens: tokens to calibrate on at most, padding not counted, up to a segment.
        evaluation_tokens: tokens whose prediction is to be measured at most, up to a segment.
        seed: of the choice.

    Raises:
        StageFailed: there are no two documents.
    """
    first: dict[bytes, Segment] = {}
    for segment in segments_of(rows):
        if segment.mask.any():
            first.setdefault(segment.ids.tobytes(), segment)
    segments = list(first.values())
    documents, document_S = np.unique([segment.document_id for segment in segments], return_inverse=True)
    if len(documents) < 2:
        raise StageFailed(
            f"the calibration split has {len(documents)} distinct documents in {len(rows)} distinct rows; expected at "
            "least one to calibrate on and another to measure on; give `Prepare` more documents, or raise its "
            "calibration_fraction"
        )
    rank_S = np.random.default_rng(seed).permutation(len(documents))[document_S]
    length_S = np.array([len(segment.ids) for segment in segments])
    measured_S = np.array([int(segment.mask.sum()) for segment in segments])
    order = np.lexsort((length_S - measured_S, rank_S))  # of a text its first window first
    rank_S, length_S, measured_S = rank_S[order], length_S[order], measured_S[order]
    goal = min(evaluation_tokens, int(measured_S.sum()) * evaluation_tokens // (calibration_tokens + evaluation_tokens))
    # Up to the segment that reaches the goal; the last document is left to calibrate on.
    may_measure = rank_S < len(documents) - 1
    evaluation = may_measure & _up_to(np.where(may_measure, measured_S, 0), goal)
    others = rank_S > rank_S[evaluation].max()
    calibration = others & _up_to(np.where(others, length_S, 0), calibration_tokens)
    chosen = ([segments[i] for i in order[is_chosen]] for is_chosen in (calibration, evaluation))
    calibrating, measuring = (_packed(each, rows) for each in chosen)
    return calibrating, measuring


def _up_to(tokens_S: NDArray[Any], goal: int) -> NDArray[np.bool_]:
    """Return the first segments, up to the one that reaches a number of tokens, at least one of them."""
    before_S = np.cumsum(tokens_S) - tokens_S
    return np.asarray(before_S < max(1, goal))


def _packed(segments: list[Segment], like: TokenRows) -> TokenRows:
    """Return rows that hold segments, as long as other rows and padded with what pads these (0 where nothing does)."""
    length = like.ids_RT.shape[1]
    padding = like.ids_RT[like.document_ids_RT < 0]
    chosen = [[segments[i] for i in row] for row in best_fit([len(segment.ids) for segment in segments], length)]
    return pack_rows(chosen, length=length, pad_token_id=int(padding[0]) if len(padding) else 0)
