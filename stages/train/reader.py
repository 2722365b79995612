"""Dataset shards (joined to signals by digest) → the rows of each optimizer step, in an order that is a function of
the seed and the step alone.

Promise: global batch i holds the same rows whatever the number of workers, the micro-batch or the step that reading
starts at; every row comes once an epoch. Shards are permuted each epoch, and rows are permuted within windows of a few
consecutive shards; at most two windows are in memory, of which one is being read ahead. A shard's signals are kept as
they were read; with k = 64 that is 400 bytes a token, and 2.3 KB for each token of one shard in all (measured).

Does not: balance shards of very different sizes, or mix rows that lie far apart in one epoch.

Shapes: B rows, T tokens, M targets (unmasked tokens) of a micro-batch, K kept entries, C temperatures.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from stages.errors import StageFailed

Array = np.ndarray[Any, Any]

COLUMNS = ("ids", "log_probs", "tail_log_mass", "log_partitions")
"""Of a signals shard."""

WINDOW_SHARDS = 2
"""Consecutive shards whose rows are mixed; also what is read at once."""
STEPS_AHEAD = 4
"""Optimizer steps that wait ready-made: enough to hide the reading of a batch, little memory."""


@dataclass(frozen=True, slots=True)
class StoredSignals:
    """The teacher's signals at each target of a micro-batch."""

    ids_MK: Tensor
    log_probs_MK: Tensor
    tail_log_mass_M: Tensor
    log_partitions_MC: Tensor
    temperatures: tuple[float, ...]
    """Those that the columns of `log_partitions` stand for."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rows of one forward pass."""

    input_ids_BT: Tensor
    """int64."""
    positions_M: Tensor
    """int64: rows of the flattened logits [B · T, V] that predict a target."""
    targets_M: Tensor
    """int64: the tokens that they predict."""
    signals: StoredSignals | None

    def to(self, device: torch.device) -> "MicroBatch":
        """Copy to a device without waiting for it; on the CPU this is the same batch."""
        return self if device.type == "cpu" else _moved(self, device)


@dataclass(frozen=True, slots=True)
class StepBatch:
    """What one rank does in one optimizer step."""

    micro_batches: tuple[MicroBatch, ...]
    num_targets: int
    """Targets of the global batch, over all ranks: what the sum of losses is divided by."""
    num_tokens: int
    """Tokens of the global batch."""


def _moved(value: Any, device: torch.device) -> Any:
    """Copy each tensor of a dataclass to a device."""
    changed = {}
    for field in fields(value):
        item = getattr(value, field.name)
        if isinstance(item, Tensor):
            changed[field.name] = item.pin_memory().to(device, non_blocking=True)
        elif isinstance(item, StoredSignals):
            changed[field.name] = _moved(item, device)
    return replace(value, **changed)


@dataclass(frozen=True, slots=True)
class ShardPair:
    """A token shard and its signals shard."""

    tokens: Path
    signals: Path | None


@dataclass(frozen=True, slots=True)
class SignalsLayout:
    """What the signals shards hold for each token."""

    k: int
    temperatures: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class _Shard:
    """The rows of a shard, in the order of its token shard."""

    tokens: dict[str, Array]
    signals: dict[str, Array]
    signals_row: Array
    """Where in `signals` each row is."""

    def rows(self, name: str, rows: Array) -> Array:
        """Return a column's rows."""
        taken: Array = self.signals[name][self.signals_row[rows]] if name in self.signals else self.tokens[name][rows]
        return taken


@dataclass(frozen=True, slots=True)
class _Window:
    """The rows of a few shards, one after another."""

    shards: tuple[_Shard, ...]

    def rows(self, names: Sequence[str], rows: Array) -> dict[str, Array]:
        """Return columns' rows, in the order that is asked for."""
        starts = np.cumsum([0, *(len(shard.signals_row) for shard in self.shards)])
        owners = np.searchsorted(starts, rows, side="right") - 1
        parts = [(shard, rows[owners == i] - starts[i]) for i, shard in enumerate(self.shards)]
        # Joined they are in the order of the shards; its inverse is where each row is in that.
        places = np.argsort(np.argsort(owners, kind="stable"))
        return {name: np.concatenate([shard.rows(name, inside) for shard, inside in parts])[places] for name in names}


def _fixed_rows(table: Any, name: str) -> Array:
    column = table.column(name).combine_chunks()
    values: Array = column.flatten().to_numpy(zero_copy_only=False)
    return values.reshape(len(column), -1)


def _binary_rows(path: Path, name: str, dtype: str, width: int) -> Array:
    """Read a binary column as an array [rows, T, width]; alone, since joining its chunks copies it for a moment."""
    column = pq.read_table(path, columns=[name]).column(name).cast("large_binary").combine_chunks()
    _, offsets, data = column.buffers()
    first, last = np.frombuffer(offsets, np.int64)[[column.offset, column.offset + len(column)]]
    values = np.frombuffer(data, np.uint8)[first:last].view(dtype)
    return values.reshape(len(column), -1, width)


def _read_shard(pair: ShardPair, layout: SignalsLayout | None) -> _Shard:
    """Read a token shard and the signals of its rows.

    Raises:
        StageFailed: rows have no signals.
    """
    table = pq.read_table(pair.tokens, columns=["digest", "input_ids", "loss_mask"])
    tokens = {name: _fixed_rows(table, name) for name in ("input_ids", "loss_mask")}
    if layout is None or pair.signals is None:
        return _Shard(tokens, {}, np.arange(len(table)))
    taught = pq.read_table(pair.signals, columns=["digest"]).column("digest").to_pylist()
    where = {digest: row for row, digest in enumerate(taught)}
    wanted = table.column("digest").to_pylist()
    missing = [digest for digest in wanted if digest not in where]
    if missing:
        raise StageFailed(
            f"{len(missing)} of {len(wanted)} rows of {pair.tokens.name} have no signals (the first has digest "
            f"{missing[0].hex()}), expected one row of signals for each; run Teach on this very dataset"
        )
    signals = {
        name: _binary_rows(pair.signals, name, dtype, width)
        for name, dtype, width in (
            ("ids", "<i4", layout.k),
            ("log_probs", "<f2", layout.k),
            ("tail_log_mass", "<f4", 1),
            ("log_partitions", "<f4", len(layout.temperatures)),
        )
    }
    return _Shard(tokens, signals, np.array([where[digest] for digest in wanted], np.int64))


@dataclass(frozen=True, slots=True)
class Reader:
    """Reads the steps of one rank."""

    shards: tuple[ShardPair, ...]
    layout: SignalsLayout | None
    """None where no signals are wanted."""
    batch_rows: int
    """Rows of a global batch."""
    micro_batch: int
    """Rows of a micro-batch."""
    seed: int
    rank: int = 0
    world_size: int = 1

    def steps(self, first: int, last: int) -> Iterator[StepBatch]:
        """Yield the batches of the optimizer steps first … last − 1, made ready by a thread."""
        ready: Queue[Any] = Queue(maxsize=STEPS_AHEAD)
        abandoned = [False]

        def fill() -> None:
            try:
                for step in self._steps(first, last):
                    ready.put(step)
                    if abandoned[0]:
                        return
            except BaseException as error:  # noqa: BLE001  raised again where the steps are taken
                ready.put(error)

        Thread(target=fill, name="reader", daemon=True).start()
        try:
            for _ in range(first, last):
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            abandoned[0] = True
            while not ready.empty():
                ready.get_nowait()

    def _steps(self, first: int, last: int) -> Iterator[StepBatch]:
        pieces = self._rows_from(first * self.batch_rows)
        window, rows = next(pieces)
        for _ in range(first, last):
            taken: list[tuple[_Window, Array]] = []
            wanted = self.batch_rows
            while wanted:
                if not len(rows):
                    window, rows = next(pieces)
                taken.append((window, rows[:wanted]))
                wanted, rows = wanted - len(rows[:wanted]), rows[wanted:]
            yield self._assemble(taken)

    def _rows_from(self, row: int) -> Iterator[tuple[_Window, Array]]:
        """Yield windows and the rows to take of each, in order, from a row of the endless sequence of epochs."""
        sizes = [pq.read_metadata(pair.tokens).num_rows for pair in self.shards]
        if not sum(sizes):
            raise StageFailed("the dataset's shards hold no rows, expected at least one; look into the Prepare step")
        with ThreadPoolExecutor(1, "read-ahead") as pool:
            plan = self._plan(sizes, row)
            skip, order, chosen = next(plan)
            loading = pool.submit(self._load, chosen)
            while True:
                window, current = loading.result(), order[skip:]
                skip, order, chosen = next(plan)
                loading = pool.submit(self._load, chosen)
                yield window, current

    def _plan(self, sizes: list[int], row: int) -> Iterator[tuple[int, Array, Array]]:
        """Yield (rows to skip, row order, shards) for each window from a row on."""
        epoch, skip = divmod(row, sum(sizes))
        while True:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(sizes))
            for start in range(0, len(order), WINDOW_SHARDS):
                chosen = order[start : start + WINDOW_SHARDS]
                size = sum(sizes[shard] for shard in chosen)
                if skip >= size:
                    skip -= size
                    continue
                yield skip, np.random.default_rng([self.seed, epoch, start]).permutation(size), chosen
                skip = 0
            epoch += 1

    def _load(self, chosen: Array) -> _Window:
        return _Window(tuple(_read_shard(self.shards[shard], self.layout) for shard in chosen))

    def _assemble(self, taken: list[tuple[_Window, Array]]) -> StepBatch:
        """Cut this rank's micro-batches out of a global batch."""
        mask = np.concatenate([window.rows(["loss_mask"], rows)["loss_mask"] for window, rows in taken])
        own = np.array_split(np.arange(self.batch_rows), self.world_size)[self.rank]
        names = ("input_ids", *(COLUMNS if self.layout else ()))
        cuts = [own[start : start + self.micro_batch] for start in range(0, len(own), self.micro_batch)]
        return StepBatch(
            micro_batches=tuple(self._micro_batch(_pick(taken, cut, names), mask[cut]) for cut in cuts),
            num_targets=int(mask[:, 1:].sum()),
            num_tokens=int(mask.size),
        )

    def _micro_batch(self, rows: dict[str, Array], mask_BT: Array) -> MicroBatch:
        input_ids = torch.from_numpy(rows["input_ids"]).long()
        predicts = np.zeros(mask_BT.shape, bool)
        predicts[:, :-1] = mask_BT[:, 1:]  # logits at t predict token t + 1
        positions = torch.from_numpy(predicts.reshape(-1).nonzero()[0])
        targets = input_ids.flatten()[positions + 1]
        return MicroBatch(input_ids, positions, targets, self._signals(rows, positions))

    def _signals(self, rows: dict[str, Array], positions: Tensor) -> StoredSignals | None:
        if self.layout is None:
            return None

        def at(name: str) -> Tensor:
            return torch.from_numpy(rows[name]).flatten(0, 1)[positions]

        return StoredSignals(
            ids_MK=at("ids"),
            log_probs_MK=at("log_probs"),
            tail_log_mass_M=at("tail_log_mass")[:, 0],
            log_partitions_MC=at("log_partitions"),
            temperatures=self.layout.temperatures,
        )


def _pick(taken: list[tuple[_Window, Array]], cut: Array, names: tuple[str, ...]) -> dict[str, Array]:
    """Return rows of a global batch, by their places in it."""
    found: dict[str, list[Array]] = {}
    start = 0
    for window, rows in taken:
        inside = rows[cut[(cut >= start) & (cut < start + len(rows))] - start]
        start += len(rows)
        for name, values in window.rows(names, inside).items():
            found.setdefault(name, []).append(values)
    return {name: np.concatenate(parts) for name, parts in found.items()}
