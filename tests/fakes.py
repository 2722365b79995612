"""Fakes at the seams: a report that remembers, a context on a local folder, an artifact made of files."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stages.contract import Artifact, Context, Kind, Resources
from stages.storage import File, Folder


@dataclass
class RecordingReport:
    """Remembers what a stage told."""

    progressed: list[tuple[float, float, str]] = field(default_factory=list)
    points: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def progress(self, done: float, total: float, unit: str) -> None:
        self.progressed.append((done, total, unit))

    def curve(self, step: int, metrics: Mapping[str, float]) -> None:
        self.points.append((step, dict(metrics)))

    def note(self, text: str) -> None:
        self.notes.append(text)


def fake_context(folder: Path, inputs: Mapping[str, Any] | None = None, **resources: Any) -> Context:
    """Return a context whose `out` and `resume` lie below a local folder."""
    return Context(
        fingerprint=hashlib.sha256(str(folder).encode()).hexdigest(),
        inputs=inputs or {},
        out=Folder.at(folder / "out"),
        resume=Folder.at(folder / "resume"),
        resources=Resources(**resources),
        report=RecordingReport(),
    )


def artifact_of(kind: Kind, folder: Path, fingerprint: str | None = None) -> Artifact:
    """Return an artifact made of every file below a local folder (e.g. a fake context's `out`)."""
    files = tuple(
        File(str(path.relative_to(folder)), str(path), path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    )
    digest = hashlib.sha256("".join(f.name + f.sha256 for f in files).encode()).hexdigest()
    return Artifact(kind, fingerprint or digest, files)
