"""Fakes at the seams: a report that remembers, a context on a local folder, tasks that run in this process."""

import hashlib
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stages.contract import Artifact, Context, Kind, Resources
from stages.storage import File, Folder
from workflows.engine.driver import Driver
from workflows.engine.events import RunEvent
from workflows.engine.executor import Attempt, AttemptResult, Executor, ProgressUpdates
from workflows.engine.failures import Failure
from workflows.engine.graph import Workflow
from workflows.engine.manifest import Manifest, Provenance
from workflows.engine.plan import ClusterResources, Plan, make_plan, watch_hashing
from workflows.engine.results import RunResult, Watcher
from workflows.engine.schedule import Phase
from workflows.engine.store import ArtifactStore, Claim
from workflows.engine.worker import ProgressCollector, run_attempt


@dataclass
class RecordingReporter:
    """Remembers what a stage reported."""

    progressed: list[tuple[float, float, str]] = field(default_factory=list)
    points: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    has_begun: bool = False

    def started(self) -> None:
        self.has_begun = True

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
        reporter=RecordingReporter(),
    )


def artifact_of(kind: Kind, folder: Path, fingerprint: str | None = None) -> Artifact:
    """Return an artifact made of every file below a local folder (e.g. a fake context's `out`)."""
    files = tuple(
        File(
            str(path.relative_to(folder)), str(path), path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()
        )
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    )
    digest = hashlib.sha256("".join(f.name + f.sha256 for f in files).encode()).hexdigest()
    return Artifact(kind, fingerprint or digest, files)


class _Method:
    def __init__(self, method: Any) -> None:
        self.remote = method


class InlineTasks:
    """Runs attempts in this process, one after another, the way the engine's Ray tasks do; deaths are scripted.

    `deaths` maps a step to the failures that its first attempts end in, before they run.
    """

    def __init__(self, deaths: Mapping[str, list[Failure]] | None = None, *, cpus: float = 4) -> None:
        self.deaths = {name: list(failures) for name, failures in (deaths or {}).items()}
        self.submitted: list[str] = []
        self.requests: list[Attempt] = []
        self.cancelled: list[str] = []
        self._ended: list[tuple[str, AttemptResult | Failure]] = []
        self._box = ProgressCollector()
        self._cluster = ClusterResources(cpus, 0, cpus, 0, "the test's cluster")

    def cluster_resources(self) -> ClusterResources:
        return self._cluster

    def submit(self, request: Attempt) -> None:
        self.submitted.append(request.step)
        self.requests.append(request)
        if self.deaths.get(request.step):
            self._ended.append((request.step, self.deaths[request.step].pop(0)))
            return
        box = type("Box", (), {"add": _Method(self._box.add)})()
        self._ended.append((request.step, run_attempt(request, box)))

    def poll(self, timeout_seconds: float) -> list[tuple[str, AttemptResult | Failure]]:
        ended, self._ended = self._ended, []
        return ended

    def reports(self) -> ProgressUpdates:
        return self._box.drain()

    def cancel(self, step: str) -> None:
        self.cancelled.append(step)

    def close(self) -> None:
        pass


class SilentWatcher(Watcher):
    """Remembers the phases that a run went through."""

    def __init__(self) -> None:
        self.phases: list[tuple[str, Phase]] = []

    def step(self, name: str, phase: Phase, text: str) -> None:
        self.phases.append((name, phase))

    def progress(self, name: str, done: float, total: float, unit: str) -> None:
        pass

    def note(self, name: str, text: str) -> None:
        pass


def unwatched(_: Plan) -> AbstractContextManager[Watcher]:
    """Watch a run without showing anything."""
    return nullcontext(Watcher())


def drive(
    workflow: Workflow, store: ArtifactStore, tasks: Executor, *, run: str = "run", **options: Any
) -> tuple[RunResult, list[RunEvent]]:
    """Plan a workflow and drive it to its end; return the result and what it recorded."""
    recorded: list[RunEvent] = []
    plan = make_plan(workflow, store, watch=watch_hashing(None), cluster=tasks.cluster_resources(), **options)
    return Driver(plan, store, tasks, run, recorded.append, SilentWatcher()).go(), recorded


def fake_manifest(claim: Claim, **changes: Any) -> Manifest:
    """Return the manifest of a claim's attempt, with some fields changed."""
    provenance = Provenance(commit="c0", code_digest="d0", packages={}, python="3", host="h", platform="p")
    fields: dict[str, Any] = {
        "fingerprint": claim.fingerprint,
        "generation": claim.generation,
        "epoch": claim.epoch,
        "kind": "dataset",
        "stage": "Fake",
        "step": "fake",
        "workflow": "flow",
        "run": "run",
        "files": (),
        "metrics": {},
        "identity": {},
        "inputs": {},
        "resources": Resources(),
        "provenance": provenance,
        "seconds": 1.0,
        "peak_memory_bytes": 0,
        "created": 0.0,
    }
    return Manifest(**(fields | changes))
