"""The seam between the driver and what runs its steps: what an attempt is given, what it gives back, what runs it.

Imports no ray: workers and tests' fakes import this.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from stages.contract import Artifact, Resources, Stage
from stages.storage import Folder
from workflows.engine.failures import Failure
from workflows.engine.manifest import ManifestFile
from workflows.engine.plan import ClusterResources


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt at a step, as its worker gets it."""

    step: str
    attempt: int
    stage: Stage
    fingerprint: str
    inputs: Mapping[str, Artifact | Mapping[str, Artifact]]
    out: Folder
    resume: Folder
    logs: Folder
    resources: Resources


@dataclass(frozen=True, slots=True)
class AttemptResult:
    """An attempt that ended well: what its manifest will say."""

    files: tuple[ManifestFile, ...]
    metrics: Mapping[str, float]
    seconds: float
    peak_memory_bytes: int
    environment: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ProgressUpdates:
    """What stages reported since the last drain."""

    started: set[tuple[str, int]] = field(default_factory=set)
    """(step, attempt) whose work has its resources."""
    progress: dict[tuple[str, int], tuple[float, float, str]] = field(default_factory=dict)
    """(step, attempt) → (done, total, unit)."""
    curves: dict[tuple[str, int], list[tuple[str, float, int, int]]] = field(default_factory=dict)
    """(step, attempt) → [(metric, value, step, at_ms)]."""
    notes: list[tuple[str, int, str]] = field(default_factory=list)
    """(step, attempt, text)."""


class Executor(Protocol):
    """The seam between the driver and what runs its steps."""

    def cluster_resources(self) -> ClusterResources:
        """Return what there is to run on."""

    def submit(self, attempt: Attempt) -> None:
        """Start an attempt."""

    def poll(self, timeout_seconds: float) -> list[tuple[str, AttemptResult | Failure]]:
        """Wait for attempts to end, at most so long, and return those that did, by step."""

    def reports(self) -> ProgressUpdates:
        """Return what stages reported since the last call."""

    def cancel(self, step: str) -> None:
        """End a running attempt; `poll` will return it."""

    def close(self) -> None:
        """Leave the cluster; what still runs there for us ends."""
