"""Rows of the calibration split, and a seeded choice of some to calibrate on and of others to measure on.

Promises: no document has tokens in both sets, and no row is in both, not even as a duplicate under another document;
the same seed gives the same rows, wherever the shards lie.

Shapes: R rows, T tokens of a row.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.errors import StageFailed
from stages.formats.tokens import TokenRows, predicts, read_rows

__all__ = ["num_filled", "num_measured", "read_distinct_rows", "split_rows"]


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


def num_measured(rows: TokenRows) -> int:
    """Return the tokens whose prediction is measured."""
    return int(predicts(rows.mask_RT).sum())


def split_rows(
    rows: TokenRows, *, calibration_tokens: int, evaluation_tokens: int, seed: int
) -> tuple[TokenRows, TokenRows]:
    """Choose rows to calibrate on, and rows of other documents to measure on; of too few, in the same proportion.

    Rows that hold a document in common, or share one with a third, fall on the same side.

    Args:
        rows: what there is.
        calibration_tokens: tokens to calibrate on at most, padding not counted, up to a row.
        evaluation_tokens: tokens whose prediction is to be measured at most, up to a row.
        seed: of the choice.

    Raises:
        StageFailed: there are no two rows without a document in common.
    """
    group_R = _groups(rows.document_ids_RT)
    num_groups = int(group_R.max(initial=-1)) + 1
    if num_groups < 2:
        raise StageFailed(
            f"the calibration split has {len(rows)} distinct rows, which all hold documents in common, directly or "
            "through others; expected at least one to calibrate on and another, of other documents, to measure on; "
            "give `Prepare` more documents"
        )
    rank = np.random.default_rng(seed).permutation(num_groups)
    order = np.argsort(rank[group_R], kind="stable")
    rank_R = rank[group_R][order]
    measured_R = predicts(rows.mask_RT).sum(1)[order]
    filled_R = (rows.document_ids_RT >= 0).sum(1)[order]
    goal = min(evaluation_tokens, int(measured_R.sum()) * evaluation_tokens // (calibration_tokens + evaluation_tokens))
    # Up to the row that reaches the goal; the last group is left to calibrate on.
    evaluation = _up_to(np.where(rank_R < num_groups - 1, measured_R, 0), goal)
    evaluation &= rank_R < num_groups - 1
    others = rank_R > rank_R[evaluation].max()
    calibration = others & _up_to(np.where(others, filled_R, 0), calibration_tokens)
    return rows.take(order[calibration]), rows.take(order[evaluation])


def _up_to(tokens_R: NDArray[Any], goal: int) -> NDArray[np.bool_]:
    """Return the first rows, up to the one that reaches a number of tokens, at least one of them."""
    before_R = np.cumsum(tokens_R) - tokens_R
    return np.asarray(before_R < max(1, goal))


def _groups(document_ids_RT: NDArray[np.int64]) -> NDArray[Any]:
    """Return for each row the number of its group: rows that share documents, directly or through others."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    num_rows, length = document_ids_RT.shape
    rows_N = np.repeat(np.arange(num_rows), length)
    filled_N = document_ids_RT.ravel() >= 0
    documents, place_N = np.unique(document_ids_RT.ravel()[filled_N], return_inverse=True)
    size = num_rows + len(documents)
    ones = np.ones(len(place_N), np.int8)
    graph = coo_array((ones, (rows_N[filled_N], num_rows + place_N)), shape=(size, size))
    _, group = connected_components(graph, directed=False)
    return np.unique(group[:num_rows], return_inverse=True)[1]
