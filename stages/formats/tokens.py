"""Token shards: a dataset's packed rows as Parquet files, one row group after another; written and read here only.

A row holds segments: a document, a chat, or a window of a long text. Attention and positions stop at their borders
(`stages.models.segments`); the padding at a row's end is a segment of its own.

Promises: what is written is read again as the same arrays; deterministic bytes for equal rows; a row's digest depends
on its token ids and their positions alone. Only the columns that are asked for are read.
Does not: choose rows, or cut them into segments.

Shapes: R rows, B rows of a batch, T tokens of a row.
"""

import hashlib
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from stages.contract import Split

__all__ = [
    "TokenColumn",
    "TokenRows",
    "num_rows",
    "predicts",
    "read_batches",
    "read_rows",
    "row_digests",
    "shard_name",
    "shard_pattern",
    "to_parquet",
]

TokenColumn = Literal["digest", "positions", "document_ids", "loss_mask"]
"""What a reader can ask for besides the token ids, which it always gets."""
COLUMNS: tuple[TokenColumn, ...] = get_args(TokenColumn)
ROW_GROUP_TOKENS = 4 * 1024 * 1024
"""Tokens in one Parquet row group: 70 MB decoded, so that a reader need not hold the whole of a large shard."""
DIGEST_BYTES = 16
READ_ROWS = 256
"""Rows that `read_batches` decodes at once."""


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Packed rows; a column that was not asked for is empty."""

    ids_RT: NDArray[np.int32]
    document_ids_RT: NDArray[np.int64]
    """The document of each token; −1 at padding."""
    mask_RT: NDArray[np.bool_]
    """True where the token is a target: never at a segment's first token, which nothing before it predicts."""
    positions_RT: NDArray[np.int32] = field(default_factory=lambda: np.empty((0, 0), np.int32))
    """The place of each token in its segment, from 0; where rows are written without, each is one segment."""
    digests: list[bytes] = field(default_factory=list)
    """Of each row's token ids and positions: what rows are joined and compared by."""

    def __len__(self) -> int:
        return len(self.ids_RT)

    def take(self, indices: NDArray[np.int64] | slice) -> "TokenRows":
        """Return the rows at the given places."""
        places = range(len(self))[indices] if isinstance(indices, slice) else indices
        return TokenRows(
            self.ids_RT[indices],
            self.document_ids_RT[indices] if self.document_ids_RT.size else self.document_ids_RT,
            self.mask_RT[indices] if self.mask_RT.size else self.mask_RT,
            self.positions_RT[indices] if self.positions_RT.size else self.positions_RT,
            [self.digests[place] for place in places] if self.digests else [],
        )


def shard_name(split: Split, part: int, number: int = 0) -> str:
    """Return the logical name of a split's shard: the `number`-th that a part of the source gave."""
    return f"tokens/{split}-{part:05d}-{number:05d}.parquet"


def shard_pattern(split: Split) -> str:
    """Return the glob that a split's shards match."""
    return f"tokens/{split}-*.parquet"


def predicts(mask_BT: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return where the logits at a position predict a target: its successor's mask. The last position predicts none."""
    predicts_BT = np.zeros_like(mask_BT)
    predicts_BT[:, :-1] = mask_BT[:, 1:]
    return predicts_BT


def row_digests(ids_RT: NDArray[np.int32], positions_RT: NDArray[np.int32]) -> list[bytes]:
    """Return the digest of each row's token ids and their positions: equal rows have equal signals."""
    rows = zip(ids_RT.astype("<i4"), positions_RT.astype("<i4"), strict=True)
    return [hashlib.sha256(ids.tobytes() + places.tobytes()).digest()[:DIGEST_BYTES] for ids, places in rows]


def to_parquet(rows: TokenRows) -> bytes:
    """Return a shard's bytes; the digests are made from token ids and positions."""
    length = rows.ids_RT.shape[1]
    positions_RT = rows.positions_RT
    if not positions_RT.size:
        positions_RT = np.broadcast_to(np.arange(length, dtype=np.int32), rows.ids_RT.shape)
    table = pa.table(
        {
            "digest": pa.array(row_digests(rows.ids_RT, positions_RT), pa.binary(DIGEST_BYTES)),
            "input_ids": _fixed_lists(rows.ids_RT, pa.int32(), length),
            "positions": _fixed_lists(positions_RT, pa.int32(), length),
            "document_ids": _fixed_lists(rows.document_ids_RT, pa.int64(), length),
            "loss_mask": _fixed_lists(rows.mask_RT, pa.bool_(), length),
        }
    )
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", row_group_size=max(1, ROW_GROUP_TOKENS // length))
    return sink.getvalue()


def num_rows(paths: Iterable[Path]) -> int:
    """Return the number of rows in shards; reads their footers only."""
    return sum(pq.read_metadata(path).num_rows for path in paths)


def read_rows(paths: Iterable[Path], columns: Sequence[TokenColumn] = COLUMNS) -> TokenRows:
    """Read all rows of shards, in order.

    Args:
        paths: the shards, of one dataset.
        columns: what is wanted besides the token ids.
    """
    tables = [pq.read_table(path, columns=["input_ids", *columns]) for path in paths]
    if not tables:
        return TokenRows(np.empty((0, 0), np.int32), np.empty((0, 0), np.int64), np.empty((0, 0), np.bool_))
    return _to_rows(pa.concat_tables(tables))


def read_batches(
    paths: Iterable[Path], chosen: NDArray[np.int64], *, rows_per_batch: int, columns: Sequence[TokenColumn] = COLUMNS
) -> Iterator[TokenRows]:
    """Yield chosen rows some at a time; no more than a few batches are in memory.

    Args:
        paths: the shards, of one dataset.
        chosen: ascending indices over all rows of the shards in order.
        rows_per_batch: rows in each batch but the last.
        columns: what is wanted besides the token ids.
    """
    kept: list[Any] = []
    num_kept = offset = 0
    for path in paths:
        for record in pq.ParquetFile(path).iter_batches(batch_size=READ_ROWS, columns=["input_ids", *columns]):
            low, high = np.searchsorted(chosen, [offset, offset + record.num_rows])
            kept.append(record.take(pa.array(chosen[low:high] - offset)))
            num_kept += high - low
            offset += record.num_rows
            while num_kept >= rows_per_batch:
                table = pa.Table.from_batches(kept)
                yield _to_rows(table.slice(0, rows_per_batch))
                kept = table.slice(rows_per_batch).to_batches()
                num_kept -= rows_per_batch
    if num_kept:
        yield _to_rows(pa.Table.from_batches(kept))


def _to_rows(table: Any) -> TokenRows:
    return TokenRows(
        ids_RT=_array(table, "input_ids", np.int32),
        document_ids_RT=_array(table, "document_ids", np.int64),
        mask_RT=_array(table, "loss_mask", np.bool_),
        positions_RT=_array(table, "positions", np.int32),
        digests=table["digest"].to_pylist() if "digest" in table.column_names else [],
    )


def _array(table: Any, name: str, dtype: Any) -> Any:
    """Return a column of lists as an array [rows, T]; an empty one where it was not read."""
    if name not in table.column_names:
        return np.empty((table.num_rows, 0), dtype)
    chunks = table[name].chunks
    values = pa.concat_arrays(chunks) if chunks else table[name].combine_chunks()
    return values.flatten().to_numpy(zero_copy_only=False).reshape(table.num_rows, values.type.list_size)


def _fixed_lists(values_RT: NDArray[Any], kind: Any, length: int) -> Any:
    return pa.FixedSizeListArray.from_arrays(pa.array(values_RT.ravel(), kind), length)
