"""Lease of office: who may do a thing that only one process at a time may do, by create-only objects in a folder.

    taken-<term>.json   who holds this term
    free-<term>.json    that one has let go

Promises: a term has one holder; the next one is given when the holder lets go or is dead (`heartbeat`), never before.
Does not: fence a holder off that was paused for longer than its run's heartbeat may be still.
"""

import os
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import psutil

from stages.storage import AlreadyExists, Folder
from workflows.engine.heartbeat import Holder, Liveness, boot_id

__all__ = ["Lease", "holder_of", "numbered"]

TAKEN_SECONDS = 120.0
"""A holder on another host, whose process cannot be seen from here, is taken to live for this long at least."""
POLL_SECONDS = 0.1
PATIENCE_SECONDS = 60.0


def holder_of(run: str, pid: int) -> Holder:
    """Return a process of this host as one that acts for a run."""
    return Holder(run, socket.gethostname(), boot_id(), pid, psutil.Process(pid).create_time())


class Lease:
    """The terms of one office."""

    def __init__(self, folder: Folder) -> None:
        """Look at the office whose objects lie in a folder; nothing is written yet."""
        self._folder = folder

    def take(self, holder: Holder, liveness: Liveness) -> int | None:
        """Begin a term; return its number, or None where another one holds the office."""
        names = self._names()
        term = max(numbered(names, "taken-"), default=0)
        if term and _free(term) not in names and self._lives(term, liveness):
            return None
        try:
            self._folder.put_json(_taken(term + 1), holder.to_json(), create=True)
        except AlreadyExists:
            return None
        return term + 1

    def let_go(self, term: int) -> None:
        """End a term, so that the next holder need not wait for this process to die."""
        try:
            self._folder.put_json(_free(term), {}, create=True)
        except AlreadyExists:
            return

    @contextmanager
    def held(self, run: str, liveness: Liveness) -> Iterator[None]:
        """Hold the office, once it is free; earlier terms are forgotten.

        Raises:
            TimeoutError: another process held it for all the time that one may wait.
        """
        holder, deadline = holder_of(run, os.getpid()), time.monotonic() + PATIENCE_SECONDS
        while (term := self.take(holder, liveness)) is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"another process held {self._folder.uri} for more than {PATIENCE_SECONDS:g} s")
            time.sleep(POLL_SECONDS)
        try:
            past = [
                name for name in self._names() if min(numbered([name], "taken-") + numbered([name], "free-")) < term
            ]
            self._folder.delete(past)
            yield
        finally:
            self.let_go(term)

    def _lives(self, term: int, liveness: Liveness) -> bool:
        try:
            holder = Holder.from_json(self._folder.get_json(_taken(term)))
        except FileNotFoundError:  # forgotten meanwhile: there is a later term
            return True
        if holder.process_lives() is None:
            taken = [entry.modified for entry in self._folder.entries() if entry.name == _taken(term)]
            return time.time() - max(taken, default=0.0) < TAKEN_SECONDS or liveness.alive(holder)
        return liveness.alive(holder)

    def _names(self) -> frozenset[str]:
        return frozenset(entry.name for entry in self._folder.entries())


def numbered(names: Iterable[str], prefix: str) -> list[int]:
    """Return the numbers of the objects `<prefix><number>.json`, in order."""
    stems = [name.removeprefix(prefix).removesuffix(".json") for name in names if name.startswith(prefix)]
    return sorted(int(stem) for stem in stems if stem.isdigit())


def _taken(term: int) -> str:
    return f"taken-{term:06d}.json"


def _free(term: int) -> str:
    return f"free-{term:06d}.json"
