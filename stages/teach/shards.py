"""One token shard → one signals shard, as Parquet bytes; rows are joined by digest later, so order does not matter.

Promise: the bytes depend on the rows and the teacher's signals only; each value is one contiguous little-endian
buffer for each row, so that a reader takes whole rows without parsing numbers.

Does not: write anywhere, or know how the signals come about.

Shapes: B rows, T tokens, K kept entries, C temperatures.
"""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from stages.errors import StageFailed
from stages.runtime.translation import within_memory
from stages.teach.capture import Signals

SCHEMA = pa.schema(
    [
        ("digest", pa.binary(16)),
        ("ids", pa.binary()),
        ("log_probs", pa.binary()),
        ("tail_log_mass", pa.binary()),
        ("log_partitions", pa.binary()),
    ]
)
"""The columns of a signals shard; see `stages.contract` for where it lies."""


@dataclass(frozen=True, slots=True)
class ShardSignals:
    """A finished shard: its bytes and what the manifest wants to know of it."""

    data: bytes
    rows: int
    tokens: int


def _token_batches(path: Path, batch_rows: int) -> Iterator[tuple[list[bytes], np.ndarray[Any, Any]]]:
    """Yield digests and input_ids [B, T] of a token shard."""
    table = pq.read_table(path, columns=["digest", "input_ids"])
    for batch in table.combine_chunks().to_batches(max_chunksize=batch_rows):
        column = batch.column("input_ids")
        input_ids = column.flatten().to_numpy(zero_copy_only=False).reshape(len(batch), -1)
        yield batch.column("digest").to_pylist(), input_ids


def _binary(values: np.ndarray[Any, Any], num_rows: int) -> pa.Array:
    """Return a binary column whose row r holds the r-th equal part of an array's bytes."""
    data = np.ascontiguousarray(values)
    offsets = np.arange(num_rows + 1, dtype=np.int64) * (data.nbytes // num_rows)
    large = pa.Array.from_buffers(pa.large_binary(), num_rows, [None, pa.py_buffer(offsets), pa.py_buffer(data)])
    return large.cast(pa.binary())


def record(digests: list[bytes], signals: Signals) -> pa.RecordBatch:
    """Return rows as they are stored: signals of B · T tokens and the digests of their B rows."""
    rows = len(digests)
    columns = [
        pa.array(digests, pa.binary(16)),
        _binary(signals.ids_NK.numpy().astype("<i4", copy=False), rows),
        _binary(signals.log_probs_NK.numpy().astype("<f2", copy=False), rows),
        _binary(signals.tail_log_mass_N.numpy().astype("<f4", copy=False), rows),
        _binary(signals.log_partitions_NC.numpy().astype("<f4", copy=False), rows),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def _refuse_broken(signals: Signals, digests: list[bytes], dtype: str) -> None:
    if bool(signals.finite_N.all()):
        return
    broken = (~signals.finite_N.view(len(digests), -1)).sum(1)
    row = int(broken.nonzero()[0])
    raise StageFailed(
        f"the teacher's logits are NaN or infinite at {int(broken[row])} tokens of the row with digest "
        f"{digests[row].hex()} (computed in {dtype}), expected finite numbers; "
        f"check the teacher's weights, or set dtype='float32'"
    )


def teach_shard(path: Path, teach: Callable[[torch.Tensor], Signals], *, batch_rows: int, dtype: str) -> ShardSignals:
    """Run a teacher over the rows of one token shard.

    Args:
        path: a `tokens/…parquet` file.
        teach: input_ids [B, T] → signals of its B · T tokens, on the CPU.
        batch_rows: rows in one call of it.
        dtype: what the teacher computes in, for messages.

    Raises:
        StageFailed: the teacher gave NaN or infinite logits; names the row.
        OutOfMemory: the device's memory did not hold a batch.
    """
    sink = io.BytesIO()
    num_rows = num_tokens = 0
    with pq.ParquetWriter(sink, SCHEMA, compression="zstd", compression_level=1, use_dictionary=False) as writer:
        for digests, input_ids_BT in _token_batches(path, batch_rows):
            with within_memory(f"the teacher on {input_ids_BT.shape[1]} tokens a row", micro_batch=len(digests)):
                signals = teach(torch.from_numpy(input_ids_BT.copy()))
            _refuse_broken(signals, digests, dtype)
            writer.write_batch(record(digests, signals))
            num_rows, num_tokens = num_rows + len(digests), num_tokens + input_ids_BT.size
    return ShardSignals(sink.getvalue(), num_rows, num_tokens)
