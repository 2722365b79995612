"""Signal shards: a teacher's signals at each row of a token shard, as a Parquet file; written and read here only.

One row of signals for each row of tokens, joined by digest, so that order does not matter. Each value is one
contiguous little-endian buffer for each row, so that a reader takes whole rows without parsing numbers.

Promises: the bytes depend on the rows and their signals only; what is written is read again bit for bit.
Does not: know how signals come about (`stages.teach.capture`) or what they mean to a loss (`stages.ops.targets`).

Shapes: R rows, T tokens of a row, N = R · T, K kept entries, C temperatures.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from stages.formats.tokens import DIGEST_BYTES

__all__ = [
    "COLUMNS",
    "PATTERN",
    "Record",
    "SignalColumn",
    "read_column",
    "read_digests",
    "record",
    "signals_name",
    "writer",
]

SignalColumn = Literal["ids", "log_probs", "tail_log_mass", "log_partitions"]
"""What is kept at each token: `ids` [K] by descending probability; `log_probs` [K], natural logarithms at temperature
1, normalized over the full vocabulary; `tail_log_mass`, the log of the mass outside of them at temperature 1;
`log_partitions` [C], one for each temperature."""
COLUMNS: tuple[SignalColumn, ...] = get_args(SignalColumn)
DTYPES: dict[SignalColumn, str] = {"ids": "<i4", "log_probs": "<f2", "tail_log_mass": "<f4", "log_partitions": "<f4"}
SCHEMA = pa.schema([("digest", pa.binary(DIGEST_BYTES)), *((name, pa.binary()) for name in COLUMNS)])
Record = Any
"""Some rows as Arrow has them: what `record` makes and `writer` takes."""
PATTERN = "signals/*.parquet"
"""The glob that an artifact's signal shards match."""


def signals_name(tokens_name: str) -> str:
    """Return the logical name of the signal shard of a token shard."""
    return tokens_name.replace("tokens/", "signals/", 1)


@contextmanager
def writer(sink: IO[bytes]) -> Iterator[Callable[[Record], None]]:
    """Yield what writes one record after another into a sink."""
    options: dict[str, Any] = {"compression": "zstd", "compression_level": 1, "use_dictionary": False}
    with pq.ParquetWriter(sink, SCHEMA, **options) as parquet:
        yield parquet.write_batch


def record(digests: Sequence[bytes], values: Mapping[SignalColumn, NDArray[Any]]) -> Record:
    """Return rows as they are stored: the digests of R rows, and each column's values at their R · T tokens."""
    columns = [_binary(values[name], DTYPES[name], len(digests)) for name in COLUMNS]
    return pa.RecordBatch.from_arrays([pa.array(digests, pa.binary(DIGEST_BYTES)), *columns], schema=SCHEMA)


def read_digests(path: Path) -> list[bytes]:
    """Return the digests of a shard's rows, in their order."""
    digests: list[bytes] = pq.read_table(path, columns=["digest"]).column("digest").to_pylist()
    return digests


def read_column(path: Path, name: SignalColumn, *, width: int) -> NDArray[Any]:
    """Read a column as an array [R, T, width]; each alone, since joining its chunks copies it for a moment.

    Args:
        path: the shard.
        name: the column.
        width: numbers for each token: K, 1 or C.
    """
    column = pq.read_table(path, columns=[name]).column(name).cast("large_binary").combine_chunks()
    _, offsets, data = column.buffers()
    first, last = np.frombuffer(offsets, np.int64)[[column.offset, column.offset + len(column)]]
    values = np.frombuffer(data, np.uint8)[first:last].view(DTYPES[name])
    return values.reshape(len(column), -1, width)


def _binary(values: NDArray[Any], dtype: str, num_rows: int) -> pa.Array:
    """Return a binary column whose row r holds the r-th equal part of an array's bytes."""
    data = np.ascontiguousarray(values.astype(dtype, copy=False))
    offsets = np.arange(num_rows + 1, dtype=np.int64) * (data.nbytes // num_rows)
    large = pa.Array.from_buffers(pa.large_binary(), num_rows, [None, pa.py_buffer(offsets), pa.py_buffer(data)])
    return large.cast(pa.binary())
