"""Packed rows of a dataset's split, as small batches of arrays.

Promises: the same rows in the same order for the same arguments, so that every model is scored on the same text, and
that the n-th batch of one pass is the n-th of any other; no more than a few batches in memory.

Shapes: B rows, T tokens of a row.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

__all__ = ["Batch", "choose_rows", "count_rows", "read_batches"]

COLUMNS = ("input_ids", "document_ids", "loss_mask")


@dataclass(frozen=True, slots=True)
class Batch:
    """Some packed rows."""

    input_ids_BT: NDArray[np.int32]
    document_ids_BT: NDArray[np.int64]
    """The document of each token; −1 for padding."""
    loss_mask_BT: NDArray[np.bool_]
    """True where a token is to be predicted from those before it."""


def count_rows(paths: Sequence[Path]) -> int:
    """Return the number of rows in token shards; reads their footers only."""
    return sum(pq.read_metadata(path).num_rows for path in paths)


def choose_rows(num_rows: int, *, max_rows: int | None, seed: int) -> NDArray[np.int64]:
    """Return the indices of the rows to read, ascending: all, or `max_rows` drawn without replacement."""
    if max_rows is None or max_rows >= num_rows:
        return np.arange(num_rows)
    return np.sort(np.random.default_rng(seed).choice(num_rows, size=max_rows, replace=False))


def read_batches(paths: Sequence[Path], chosen: NDArray[np.int64], *, rows_per_batch: int) -> Iterator[Batch]:
    """Yield the chosen rows (ascending indices over all shards in order), `rows_per_batch` at a time."""
    kept: list[Any] = []
    num_kept = offset = 0
    for path in paths:
        for record in pq.ParquetFile(path).iter_batches(batch_size=256, columns=list(COLUMNS)):
            low, high = np.searchsorted(chosen, [offset, offset + record.num_rows])
            kept.append(record.take(pa.array(chosen[low:high] - offset)))
            num_kept += high - low
            offset += record.num_rows
            while num_kept >= rows_per_batch:
                table = pa.Table.from_batches(kept)
                yield _to_batch(table.slice(0, rows_per_batch))
                kept = table.slice(rows_per_batch).to_batches()
                num_kept -= rows_per_batch
    if num_kept:
        yield _to_batch(pa.Table.from_batches(kept))


def _to_batch(table: Any) -> Batch:
    input_ids, document_ids, loss_mask = (
        pa.concat_arrays(table[name].chunks).flatten().to_numpy(zero_copy_only=False).reshape(table.num_rows, -1)
        for name in COLUMNS
    )
    return Batch(input_ids, document_ids, loss_mask)
