"""Rows of the calibration split, and a seeded choice of disjoint ones to calibrate on and to measure on.

Promises: no row is in both sets, not even as a duplicate under another document; the same seed gives the same rows,
wherever the shards lie.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from stages.errors import StageFailed
from stages.formats.tokens import TokenRows, predicts, read_rows

__all__ = ["read_distinct_rows", "split_rows"]


def read_distinct_rows(paths: Iterable[Path]) -> TokenRows:
    """Read token shards; a row that occurs twice (by its digest), or predicts nothing, is left out.

    Raises:
        StageFailed: there is no row to read.
    """
    rows = read_rows(paths, ("digest", "loss_mask"))
    if not len(rows):
        raise StageFailed(
            "the dataset has no calibration rows (tokens/calibration-*.parquet); give `Prepare` more documents"
        )
    first = {digest: index for index, digest in reversed(list(enumerate(rows.digests)))}
    predicts_RT = predicts(rows.mask_RT)
    return rows.take(np.array(sorted(index for index in first.values() if predicts_RT[index].any()), dtype=np.int64))


def split_rows(rows: TokenRows, *, calibration: int, evaluation: int, seed: int) -> tuple[TokenRows, TokenRows]:
    """Choose rows to calibrate on and others to measure on; of too few rows, in the same proportion.

    Raises:
        StageFailed: there are fewer than two rows.
    """
    if len(rows) < 2:
        raise StageFailed(
            f"the calibration split has {len(rows)} distinct rows, expected at least one to calibrate on and another "
            f"to measure on, better {calibration + evaluation}; give `Prepare` more documents"
        )
    wanted = calibration + evaluation
    if len(rows) < wanted:
        evaluation = min(max(1, len(rows) * evaluation // wanted), len(rows) - 1)
        calibration = len(rows) - evaluation
    order = np.random.default_rng(seed).permutation(len(rows))
    return rows.take(order[evaluation : evaluation + calibration]), rows.take(order[:evaluation])
