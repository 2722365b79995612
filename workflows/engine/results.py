"""How a run goes and how it ended: what the driver shows a watcher, and what it returns."""

from collections.abc import Mapping
from dataclasses import dataclass

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
