"""Whether a run lives: its one heartbeat, or, on the same host and boot, its process."""

import os
import socket
import threading
import time
from collections.abc import Mapping
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


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a claim."""

    run: str
    host: str
    boot: str
    pid: int
    started: float
    """The process's start time, since process ids are used again."""

    @classmethod
    def of_this_process(cls, run: str) -> "Holder":
        """Return this process as the holder for a run."""
        pid = os.getpid()
        return cls(run, socket.gethostname(), boot_id(), pid, psutil.Process(pid).create_time())

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Holder":
        """Return the holder that `to_json` wrote."""
        return cls(**value)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON."""
        return asdict(self)

    def process_lives(self) -> bool | None:
        """Tell whether its process lives; None where that cannot be seen from here."""
        if (self.host, self.boot) != (socket.gethostname(), boot_id()):
            return None
        try:
            process = psutil.Process(self.pid)
            return abs(process.create_time() - self.started) < 1.0 and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


class Liveness:
    """Watches other runs' heartbeats."""

    def __init__(self, runs: Folder) -> None:
        """Watch the runs below a folder."""
        self._runs = runs
        self._seen: dict[str, tuple[float, float]] = {}
        """run → (its heartbeat's modification time, when this process first saw that)."""

    def run_alive(self, run: str) -> bool:
        """Tell whether a run's driver lives."""
        try:
            return self.alive(Holder.from_json((self._runs / run).get_json("heartbeat.json")))
        except FileNotFoundError:
            return False

    def alive(self, holder: Holder) -> bool:
        """Tell whether a holder may still write."""
        lives = holder.process_lives()
        if lives is not None:
            return lives
        beats = [entry for entry in (self._runs / holder.run).entries() if entry.name == "heartbeat.json"]
        if not beats or time.time() - beats[0].modified > LONG_DEAD_SECONDS:
            return False
        modified, first_seen = self._seen.get(holder.run, (0.0, 0.0))
        if modified != beats[0].modified:
            self._seen[holder.run] = (beats[0].modified, time.monotonic())
            return True
        return time.monotonic() - first_seen < STALE_SECONDS


class Heartbeat:
    """Writes a run's heartbeat from a thread until it is stopped."""

    def __init__(self, runs: Folder, run: str) -> None:
        """Begin to beat."""
        self._folder, self._run = runs / run, run
        self._stop = threading.Event()
        self._beat()
        self._thread = threading.Thread(target=self._loop, name="heartbeat", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        self._folder.put_json("heartbeat.json", Holder.of_this_process(self._run).to_json())

    def _loop(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            try:
                self._beat()
            except Exception:  # noqa: BLE001  a missed beat is what the others' patience (STALE_SECONDS) is for
                continue

    def stop(self) -> None:
        """Stop beating; the last beat stays."""
        self._stop.set()
        self._thread.join(timeout=BEAT_SECONDS)
