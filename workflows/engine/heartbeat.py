"""Whether a run lives: its one heartbeat, or, on the same host and boot, its process."""

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from stages.storage import Folder

BEAT_SECONDS = 5.0
STALE_SECONDS = 60.0
"""A holder whose heartbeat has not moved for so long, by the watcher's own clock, is dead: hosts' clocks may differ."""
LONG_DEAD_SECONDS = 900.0
"""One whose heartbeat is this old by the store's clock is dead at first sight."""


@cache
def boot_id() -> str:
    """Return what changes when this host boots, and between containers: process ids mean something within it only."""
    boot, processes = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    name = boot.read_text().strip() if boot.exists() else str(int(psutil.boot_time()))
    return f"{name} {processes.readlink()}" if processes.is_symlink() else name


def start_time(pid: int) -> float:
    """Return what distinguishes a process from a later one of its id: its start by a clock that nobody sets.

    On Linux in ticks since boot. `psutil`'s start time is that plus the boot time, which moves with the clock.

    Raises:
        psutil.NoSuchProcess: there is no such process.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return psutil.Process(pid).create_time()
    return float(stat.rpartition(b")")[2].split()[19])  # field 22; the name before it may hold spaces


@dataclass(frozen=True, slots=True)
class Holder:
    """The process that holds a lease, and the run that it acts for."""

    run: str
    host: str
    boot: str
    pid: int
    started: float
    """`start_time` of the process, since process ids are used again."""

    @classmethod
    def of_this_process(cls, run: str) -> "Holder":
        """Return this process as the holder for a run."""
        return cls(run, socket.gethostname(), boot_id(), os.getpid(), start_time(os.getpid()))

    @classmethod
    def from_json(cls, value: Any) -> "Holder | None":
        """Return the holder that `to_json` wrote; None where the value is torn or of another version."""
        try:
            return cls(**value)
        except TypeError:
            return None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON."""
        return asdict(self)

    def process_lives(self) -> bool | None:
        """Return whether its process lives; None where that cannot be seen from here."""
        if (self.host, self.boot) != (socket.gethostname(), boot_id()):
            return None
        try:
            same = start_time(self.pid) == self.started
            return same and psutil.Process(self.pid).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


class Liveness:
    """Watches other runs' heartbeats."""

    def __init__(self, runs: Folder) -> None:
        self._runs = runs
        self._seen: dict[tuple[str, float], tuple[float, float]] = {}
        """(run, since) → (its last sign of life by the store's clock, when this process first saw that)."""

    def run_alive(self, run: str) -> bool:
        """Return whether a run's driver lives."""
        holder = Holder.from_json((self._runs / run).find_json("heartbeat.json"))
        return holder is not None and self.alive(holder)

    def alive(self, holder: Holder, *, since: float = 0.0) -> bool:
        """Return whether a holder may still write.

        When it took its lease, `since` by the store's clock, is a sign of life as good as a heartbeat.
        """
        if (lives := holder.process_lives()) is not None:
            return lives
        beats = [entry.modified for entry in (self._runs / holder.run).entries() if entry.name == "heartbeat.json"]
        last = max([since, *beats])
        if time.time() - last > LONG_DEAD_SECONDS:
            return False
        seen, first_seen = self._seen.get((holder.run, since), (0.0, 0.0))
        if seen != last:
            self._seen[holder.run, since] = (last, time.monotonic())
            return True
        return time.monotonic() - first_seen < STALE_SECONDS


@contextmanager
def beating(runs: Folder, run: str) -> Iterator[None]:
    """Write a run's sign of life from a thread; the last one stays.

    To be held around all that a run does, its planning included: `gc` must see a run before that reads.
    """
    stop = threading.Event()

    def beat() -> None:
        (runs / run).put_json("heartbeat.json", Holder.of_this_process(run).to_json())

    def go_on() -> None:
        while not stop.wait(BEAT_SECONDS):
            with suppress(Exception):  # a missed beat is what the others' patience (STALE_SECONDS) is for
                beat()

    beat()
    thread = threading.Thread(target=go_on, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=BEAT_SECONDS)
