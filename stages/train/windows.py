"""Token shards joined to their signal shards by digest: some whole shards at a time, in memory.

Promise: a shard's signals are kept as they were read; with k = 64 that is 400 bytes a token, and 2.3 KB for each token
of one shard in all while it is read (measured): 150 MB for a shard of 65,536.

Shapes: R rows, T tokens of a row, K kept entries, C temperatures.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stages.errors import StageFailed
from stages.formats import tokens
from stages.formats.signal_shards import COLUMNS, SignalColumn, read_column, read_digests

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class ShardPair:
    """A token shard and its signal shard."""

    tokens: Path
    signals: Path | None


@dataclass(frozen=True, slots=True)
class SignalsLayout:
    """What the signal shards hold for each token, and what is wanted of it."""

    k: int
    temperatures: tuple[float, ...]
    columns: tuple[SignalColumn, ...] = COLUMNS

    def width(self, column: SignalColumn) -> int:
        """Return the numbers of a column for each token."""
        return {"tail_log_mass": 1, "log_partitions": len(self.temperatures)}.get(column, self.k)


@dataclass(frozen=True, slots=True)
class Shard:
    """The rows of a shard, in the order of its token shard."""

    tokens: dict[str, Array]
    signals: Mapping[SignalColumn, Array]
    signals_row: Array
    """Where in `signals` each row is."""

    def rows(self, name: Any, rows: Array) -> Array:
        """Return a column's rows."""
        taken: Array = self.signals[name][self.signals_row[rows]] if name in self.signals else self.tokens[name][rows]
        return taken


@dataclass(frozen=True, slots=True)
class Window:
    """The rows of a few shards, one after another."""

    shards: tuple[Shard, ...]

    def rows(self, names: Sequence[str], rows: Array) -> dict[str, Array]:
        """Return columns' rows, in the order that is asked for."""
        starts = np.cumsum([0, *(len(shard.signals_row) for shard in self.shards)])
        owners = np.searchsorted(starts, rows, side="right") - 1
        parts = [(shard, rows[owners == i] - starts[i]) for i, shard in enumerate(self.shards)]
        # Joined they are in the order of the shards; its inverse is where each row is in that.
        places = np.argsort(np.argsort(owners, kind="stable"))
        return {name: np.concatenate([shard.rows(name, inside) for shard, inside in parts])[places] for name in names}


def read_shard(pair: ShardPair, layout: SignalsLayout | None) -> Shard:
    """Read a token shard and the signals of its rows.

    Raises:
        StageFailed: rows have no signals.
    """
    joined = layout is not None and pair.signals is not None
    rows = tokens.read_rows([pair.tokens], ("positions", "loss_mask", *(("digest",) if joined else ())))
    arrays = {"input_ids": rows.ids_RT, "positions": rows.positions_RT, "loss_mask": rows.mask_RT}
    if layout is None or pair.signals is None:
        return Shard(arrays, {}, np.arange(len(rows)))
    where = {digest: row for row, digest in enumerate(read_digests(pair.signals))}
    missing = [digest for digest in rows.digests if digest not in where]
    if missing:
        raise StageFailed(
            f"{len(missing)} of {len(rows)} rows of {pair.tokens.name} have no signals (the first has digest "
            f"{missing[0].hex()}), expected one row of signals for each; run Teach on this very dataset"
        )
    signals = {name: read_column(pair.signals, name, width=layout.width(name)) for name in layout.columns}
    return Shard(arrays, signals, np.array([where[digest] for digest in rows.digests], np.int64))
