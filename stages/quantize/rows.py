"""Rows of the calibration split, and a seeded choice of disjoint ones to calibrate on and to measure on.

Promises: no row is in both sets, not even as a duplicate under another document; the same seed gives the same rows,
wherever the shards lie.

Shape letters: R rows, T tokens of a row.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stages.errors import StageFailed


@dataclass(frozen=True, slots=True)
class Rows:
    """Packed sequences."""

    ids_RT: np.ndarray
    """Token ids, int32."""
    predicts_RT: np.ndarray
    """True where the position predicts a target: its successor's loss mask. The last position predicts none."""

    def __len__(self) -> int:
        return len(self.ids_RT)

    def take(self, indices: np.ndarray) -> "Rows":
        """Return the rows at the given places."""
        return Rows(self.ids_RT[indices], self.predicts_RT[indices])


def read_rows(paths: Iterable[Path]) -> Rows:
    """Read token shards; a row that occurs twice (by its digest), or predicts nothing, is left out.

    Raises:
        StageFailed: there is no row to read.
    """
    ids: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    digests: list[bytes] = []
    for path in paths:
        table = pq.read_table(path, columns=["digest", "input_ids", "loss_mask"])
        for column, into in (("input_ids", ids), ("loss_mask", masks)):
            values = table[column].combine_chunks()
            flat = pa.concat_arrays([values.flatten()]).to_numpy(zero_copy_only=False)
            into.append(flat.reshape(table.num_rows, -1))
        digests += table["digest"].to_pylist()
    if not digests:
        raise StageFailed(
            "the dataset has no calibration rows (tokens/calibration-*.parquet); give `Prepare` more documents"
        )
    ids_RT, mask_RT = np.concatenate(ids).astype(np.int32), np.concatenate(masks).astype(bool)
    predicts_RT = np.zeros_like(mask_RT)
    predicts_RT[:, :-1] = mask_RT[:, 1:]
    first = {digest: i for i, digest in reversed(list(enumerate(digests)))}
    kept = sorted(i for i in first.values() if predicts_RT[i].any())
    return Rows(ids_RT, predicts_RT).take(np.array(kept, dtype=np.int64))


def split_rows(rows: Rows, *, calibration: int, evaluation: int, seed: int) -> tuple[Rows, Rows]:
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
