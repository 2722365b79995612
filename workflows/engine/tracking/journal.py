"""A run's journal: what MLflow shall be told, as create-only objects, before MLflow is told.

    <store>/runs/<run>/ledger/000001.json      a batch of records with their times, secrets already redacted
                             /sent-000001.json  MLflow has this batch and all before it
                             /claims/, /released/  the lease: who sends, the run itself or one that replays it
                             /finished.json     all is sent and no MLflow run of it is left open

Promises: a batch is whole or absent, and stays as it is; only one sender holds a journal, while it lives.
Does not: know MLflow. Batches may hold NaN and infinities as Python's `json` writes them.
"""

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from numbers import Real
from typing import Any

from stages.storage import AlreadyExists, Folder
from workflows.engine.events import RunEvent, from_json, to_json
from workflows.engine.heartbeat import Liveness
from workflows.engine.lease import Lease
from workflows.engine.redaction import redacted_tree

__all__ = ["Journal", "unfinished"]

LOOKS_AT_ONCE = 16
"""Requests at once when old runs are looked through: an object store takes some 30 ms for each."""


class Journal:
    """One run's journal."""

    def __init__(self, folder: Folder) -> None:
        """Open the journal in a folder `<store>/runs/<run>/ledger`; nothing is written yet."""
        self._folder = folder
        self.sender = Lease(folder, Liveness(Folder(folder.uri.rsplit("/", 2)[0])))
        """Who may send this journal."""
        self._last = 0

    def append(self, records: Sequence[RunEvent]) -> int:
        """Write one batch; return its number.

        Raises:
            Exception: what the store raises where it cannot be written.
        """
        body = {"at_ms": int(time.time() * 1000), "records": [redacted_tree(to_json(record)) for record in records]}
        data = json.dumps(body, sort_keys=True, default=_plain).encode()
        while True:
            self._last += 1
            try:
                self._folder.put(f"{self._last:06d}.json", data, create=True)
            except AlreadyExists:  # by a put whose answer was lost; a record that is sent twice is told once
                continue
            except Exception:
                self._last -= 1
                raise
            return self._last

    def numbers(self) -> list[int]:
        """Return the numbers of all batches, in order."""
        return numbered(self._names(), "")

    def read(self, number: int) -> list[RunEvent]:
        """Return a batch's records."""
        return [from_json(value) for value in self._folder.get_json(f"{number:06d}.json")["records"]]

    def sent(self) -> int:
        """Return the number up to which MLflow has every batch."""
        return max(numbered(self._names(), "sent-"), default=0)

    def mark_sent(self, number: int, facts: Mapping[str, Any] | None = None) -> None:
        """Note that MLflow has every batch up to `number`."""
        self._create(f"sent-{number:06d}.json", facts or {})

    def finish(self) -> None:
        """Note that nothing is left to do for this run, ever."""
        self._create("finished.json", {})

    def finished(self) -> bool:
        """Tell whether nothing is left to do for this run."""
        return self._folder.has("finished.json")

    def _names(self) -> frozenset[str]:
        return frozenset(entry.name for entry in self._folder.entries())

    def _create(self, name: str, value: Mapping[str, Any]) -> None:
        try:
            self._folder.put_json(name, value, create=True)
        except AlreadyExists:
            return


def unfinished(runs: Folder) -> list[tuple[str, Journal]]:
    """Return the runs, oldest first, for which something may be left to do."""
    found = [(run, Journal(runs / run / "ledger")) for run in sorted(runs.children())]
    with ThreadPoolExecutor(LOOKS_AT_ONCE) as pool:
        finished = pool.map(lambda item: item[1].finished(), found)
        return [item for item, over in zip(found, finished, strict=True) if not over]


def _plain(value: object) -> float | str:
    """Return a value that `json` does not know (NumPy's numbers, paths) as one that it does."""
    return float(value) if isinstance(value, Real) else str(value)


def numbered(names: Iterable[str], prefix: str) -> list[int]:
    """Return the numbers of the objects `<prefix><number>.json`, in order."""
    stems = [name.removeprefix(prefix).removesuffix(".json") for name in names if name.startswith(prefix)]
    return sorted(int(stem) for stem in stems if stem.isdigit())
