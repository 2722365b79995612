"""Dataset shards → the rows of each optimizer step, in an order that is a function of the seed and the step alone.

Promise: global batch i holds the same rows whatever the number of workers, the micro-batch or the step that reading
starts at; every row comes once an epoch. Shards are permuted each epoch, and rows are permuted within windows of a few
consecutive shards; at most two windows are in memory, of which one is being read ahead.

Does not: balance shards of very different sizes, or mix rows that lie far apart in one epoch.

Shapes: B rows, T tokens, M targets (unmasked tokens) of a micro-batch, K kept entries, C temperatures.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import Queue
from threading import Thread
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stages.errors import StageFailed
from stages.formats.signal_shards import SignalColumn
from stages.formats.tokens import num_rows, predicts
from stages.train.batches import MicroBatch, StepBatch, StoredSignals
from stages.train.windows import Array, ShardPair, SignalsLayout, Window, read_shard

WINDOW_SHARDS = 8
"""Consecutive shards whose rows are mixed; also what is read at once: half a million tokens, 210 MB with k = 64."""
STEPS_AHEAD = 4
"""Optimizer steps that wait ready-made: enough to hide the reading of a batch, little memory."""


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

    @property
    def rows_per_epoch(self) -> int:
        """Rows of the dataset, each of which comes once an epoch; reads the shards' footers."""
        return num_rows(pair.tokens for pair in self.shards)

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
            taken: list[tuple[Window, Array]] = []
            wanted = self.batch_rows
            while wanted:
                if not len(rows):
                    window, rows = next(pieces)
                taken.append((window, rows[:wanted]))
                wanted, rows = wanted - len(rows[:wanted]), rows[wanted:]
            yield self._assemble(taken)

    def _rows_from(self, row: int) -> Iterator[tuple[Window, Array]]:
        """Yield windows and the rows to take of each, in order, from a row of the endless sequence of epochs."""
        sizes = [num_rows([pair.tokens]) for pair in self.shards]
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

    def _load(self, chosen: Array) -> Window:
        return Window(tuple(read_shard(self.shards[shard], self.layout) for shard in chosen))

    def _assemble(self, taken: list[tuple[Window, Array]]) -> StepBatch:
        """Cut this rank's micro-batches out of a global batch."""
        mask = np.concatenate([window.rows(["loss_mask"], rows)["loss_mask"] for window, rows in taken])
        own = np.array_split(np.arange(self.batch_rows), self.world_size)[self.rank]
        names = ("input_ids", "positions", *(self.layout.columns if self.layout else ()))
        cuts = [own[start : start + self.micro_batch] for start in range(0, len(own), self.micro_batch)]
        return StepBatch(
            micro_batches=tuple(self._micro_batch(_pick(taken, cut, names), mask[cut]) for cut in cuts),
            num_targets=int(predicts(mask).sum()),
            num_tokens=int(mask.size),
        )

    def _micro_batch(self, rows: dict[str, Array], mask_BT: Array) -> MicroBatch:
        input_ids = torch.from_numpy(rows["input_ids"]).long()
        positions = torch.from_numpy(predicts(mask_BT).reshape(-1).nonzero()[0])
        targets = input_ids.flatten()[positions + 1]
        position_ids = torch.from_numpy(rows["positions"]).long()
        return MicroBatch(input_ids, position_ids, positions, targets, self._signals(rows, positions))

    def _signals(self, rows: dict[str, Array], positions: Tensor) -> StoredSignals | None:
        if self.layout is None:
            return None

        def at(name: SignalColumn) -> Tensor:
            return torch.from_numpy(rows[name]).flatten(0, 1)[positions] if name in rows else torch.empty(0)

        return StoredSignals(
            ids_MK=at("ids"),
            log_probs_MK=at("log_probs"),
            tail_log_mass_M=at("tail_log_mass").flatten(),
            log_partitions_MC=at("log_partitions"),
            temperatures=self.layout.temperatures,
        )


def _pick(taken: list[tuple[Window, Array]], cut: Array, names: tuple[str, ...]) -> dict[str, Array]:
    """Return rows of a global batch, by their places in it."""
    found: dict[str, list[Array]] = {}
    start = 0
    for window, rows in taken:
        inside = rows[cut[(cut >= start) & (cut < start + len(rows))] - start]
        start += len(rows)
        for name, values in window.rows(names, inside).items():
            found.setdefault(name, []).append(values)
    return {name: np.concatenate(parts) for name, parts in found.items()}
