"""Snapshots of long training below `resume/`, so that a later attempt goes on from the newest one.

Promise: a snapshot is read only when its marker exists, which is created last and names every file with its digest; one
whose bytes do not verify, or whose marker a power cut tore, is deleted and the one before is read. Tensors are
safetensors and the rest is JSON: nothing is unpickled. Two are kept. Attempts write under names of their own, so that
one that lives on after it was abandoned can do no harm.
"""

import logging
import secrets
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from stages.storage import Folder

logger = logging.getLogger(__name__)

KEPT = 2
"""Snapshots that stay: the newest, and one in case its bytes are found damaged."""
EVERY_SECONDS = 30.0
"""Time between snapshots: what a crash can cost at most."""
COST_FRACTION = 0.05
"""Share of the time that snapshots may take: where one takes long, they come less often."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A complete snapshot, by its marker."""

    name: str
    step: int
    """Optimizer steps done."""
    sha256: str
    facts: Mapping[str, Any]


def newest(resume: Folder) -> Snapshot | None:
    """Return the newest snapshot whose bytes verify; delete the markers of later ones, which would count as kept."""
    folder = resume / "snapshots"
    markers = sorted((entry.name for entry in folder.entries() if entry.name.endswith(".json")), reverse=True)
    for marker in markers:
        with suppress(FileNotFoundError, TypeError):  # its tensors are gone; its marker is torn
            found = Snapshot(**(folder.find_json(marker) or {}))
            if folder.digest(f"{found.name}.safetensors").sha256 == found.sha256:
                return found
        logger.warning("deciding to delete the snapshot of %s, since its bytes are not those that this names", marker)
        folder.delete([marker])
    return None


def read(resume: Folder, snapshot: Snapshot) -> dict[str, Tensor]:
    """Read a snapshot's tensors to the CPU."""
    from safetensors.torch import load

    return load((resume / "snapshots").get(f"{snapshot.name}.safetensors"))


def write(resume: Folder, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write a snapshot, then its marker; then delete all but the newest `KEPT`."""
    from safetensors.torch import save_file

    folder, name = resume / "snapshots", f"{step:010d}-{secrets.token_hex(4)}"
    with tempfile.TemporaryDirectory(prefix="snapshot-") as temporary:
        path = Path(temporary) / "tensors"
        save_file({key: tensor.detach().contiguous().cpu() for key, tensor in tensors.items()}, path)
        file = folder.upload(path, f"{name}.safetensors")
    marker = {"name": name, "step": step, "sha256": file.sha256, "facts": dict(facts)}
    folder.put_json(f"{name}.json", marker, create=True)
    _delete_old(folder)


def _delete_old(folder: Folder) -> None:
    """Delete the markers of old snapshots first, then tensors that have no marker and are older than all that do."""
    names = [entry.name for entry in folder.entries()]
    marked = sorted((n.removesuffix(".json") for n in names if n.endswith(".json")), reverse=True)
    kept = marked[:KEPT]
    folder.delete([f"{name}.json" for name in marked[KEPT:]])
    folder.delete([n for n in names if n.endswith(".safetensors") and n.removesuffix(".safetensors") < kept[-1]])


@dataclass(slots=True)
class SnapshotWriter:
    """Writes snapshots by time, less often where one takes long."""

    resume: Folder
    clock: Callable[[], float] = time.monotonic
    _next: float | None = None

    def due(self) -> bool:
        """Return whether it is time for one; the first call starts the clock."""
        if self._next is None:
            self._next = self.clock() + EVERY_SECONDS
        return self.clock() >= self._next

    def keep(self, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Write a snapshot and set the time of the next."""
        started = self.clock()
        write(self.resume, step, tensors, facts)
        now = self.clock()
        self._next = now + max(EVERY_SECONDS, (now - started) / COST_FRACTION)
