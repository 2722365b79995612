"""How a run goes and how it ended: what the driver shows a watcher, what it records, and what it returns."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from workflows.engine.events import AttemptEnded, AttemptStarted, CurvePoints, RunEvent, RunStatus
from workflows.engine.plan import Plan
from workflows.engine.schedule import Phase
from workflows.engine.store import Commit


class Watcher:
    """Who sees how the run goes: the terminal. This one shows nothing."""

    def step(self, name: str, phase: Phase, text: str) -> None:
        """A step changed its phase."""

    def progress(self, name: str, done: float, total: float, unit: str) -> None:
        """A step reported how far it is."""

    def note(self, name: str, text: str) -> None:
        """A step reported a line."""


@dataclass(frozen=True, slots=True)
class Recorder:
    """Records the attempts of one run's steps as events."""

    plan: Plan
    record: Callable[[RunEvent], None]

    def hit(self, name: str, commit: Commit, attempt: int = 0) -> None:
        """A step's result was found: when the run was planned, or later, by which attempt."""
        self.opened(name, attempt, "hit")
        self.closed(name, attempt, "FINISHED", commit.artifact.metrics, {"made_by_run": commit.manifest.run})

    def opened(self, name: str, attempt: int, cache: Literal["hit", "miss"]) -> None:
        """An attempt began."""
        planned = self.plan.steps[name]
        assert planned.fingerprint is not None
        stage = planned.step.stage
        self.record(
            AttemptStarted(
                step=name,
                attempt=attempt,
                stage=type(stage).__name__,
                fingerprint=planned.fingerprint,
                cache=cache,
                config=stage.model_dump(mode="json"),
            )
        )

    def closed(
        self, name: str, attempt: int, status: RunStatus, metrics: Mapping[str, float], tags: Mapping[str, str]
    ) -> None:
        """An attempt ended."""
        self.record(AttemptEnded(step=name, attempt=attempt, status=status, metrics=metrics, tags=tags))

    def curves(self, name: str, attempt: int, points: list[tuple[str, float, int, int]]) -> None:
        """An attempt's curves grew."""
        whole = tuple((metric, value, int(step), at_ms) for metric, value, step, at_ms in points)
        self.record(CurvePoints(step=name, attempt=attempt, points=whole))


@dataclass(frozen=True, slots=True)
class StepResult:
    """How a step of a run ended."""

    name: str
    outcome: str
    """`hit`, `shared`, or the phase that it ended in: `committed`, `failed`, `skipped`, `cancelled`."""
    reason: str
    commit: Commit | None
    log: str | None
    """URI of the last attempt's log."""
    attempts: int


@dataclass(frozen=True, slots=True)
class RunResult:
    """How a run ended."""

    run: str
    steps: Mapping[str, StepResult]
    succeeded: bool
    interrupted: bool

    @property
    def executed(self) -> int:
        """Steps that this run ran and committed."""
        return sum(step.outcome == "committed" for step in self.steps.values())
