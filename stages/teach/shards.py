"""One token shard → one signal shard, as Parquet bytes.

Does not: write anywhere, or know how the signals come about.

Shapes: B rows, T tokens, K kept entries, C temperatures.
"""

import io
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path

import torch

from stages.errors import StageFailed
from stages.formats import signal_shards, tokens
from stages.runtime.translation import within_memory
from stages.teach.capture import Signals


@dataclass(frozen=True, slots=True)
class ShardSignals:
    """A finished shard: its bytes and how much it holds."""

    data: bytes
    rows: int
    tokens: int


def record_of(digests: list[bytes], signals: Signals) -> signal_shards.Record:
    """Return rows as they are stored: signals of B · T tokens and the digests of their B rows."""
    values: dict[signal_shards.SignalColumn, torch.Tensor] = {
        "ids": signals.ids_NK,
        "log_probs": signals.log_probs_NK,
        "tail_log_mass": signals.tail_log_mass_N,
        "log_partitions": signals.log_partitions_NC,
    }
    return signal_shards.record(digests, {name: tensor.numpy() for name, tensor in values.items()})


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


def teach_shard(
    path: Path,
    teach: Callable[[torch.Tensor, torch.Tensor], Signals],
    *,
    batch_rows: int,
    dtype: str,
) -> Generator[int, None, ShardSignals]:
    """Run a teacher over the rows of one token shard; yield the tokens of each batch as it is taught.

    Args:
        path: a `tokens/…parquet` file.
        teach: input_ids [B, T] and positions [B, T] → signals of their B · T tokens, on the CPU.
        batch_rows: rows in one call of it.
        dtype: what the teacher computes in, for messages.

    Returns:
        the finished shard, once all is taught.

    Raises:
        StageFailed: the teacher gave NaN or infinite logits; names the row.
        OutOfMemory: the device's memory did not hold a batch.
    """
    sink = io.BytesIO()
    rows = tokens.read_rows([path], ("digest", "positions"))
    with signal_shards.writer(sink) as write:
        for start in range(0, len(rows), batch_rows):
            batch = rows.take(slice(start, start + batch_rows))
            with within_memory(f"the teacher on {batch.ids_RT.shape[1]} tokens a row", micro_batch=len(batch)):
                signals = teach(torch.from_numpy(batch.ids_RT.copy()), torch.from_numpy(batch.positions_RT.copy()))
            _refuse_broken(signals, batch.digests, dtype)
            write(record_of(batch.digests, signals))
            yield batch.ids_RT.size
    return ShardSignals(sink.getvalue(), len(rows), rows.ids_RT.size)
