"""Turns what happens to a run's steps into the records that the ledger is told."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from stages.contract import Stage
from workflows.engine import events
from workflows.engine.events import RunEvent
from workflows.engine.plan import Plan
from workflows.engine.store import Commit

NUM_PARAMS = 12
PARAM_CHARACTERS = 60


@dataclass(frozen=True, slots=True)
class Recorder:
    """Tells the ledger about one run's steps."""

    run: str
    plan: Plan
    tell: Callable[[RunEvent], None]

    def hit(self, name: str, commit: Commit) -> None:
        """A step's result was found."""
        self.opened(name, 0, "hit")
        self.closed(name, 0, "FINISHED", commit.artifact.metrics, {"made_by_run": commit.manifest.run})

    def opened(self, name: str, attempt: int, cache: Literal["hit", "miss"]) -> None:
        """An attempt began."""
        planned = self.plan.steps[name]
        assert planned.fingerprint is not None
        stage = type(planned.step.stage).__name__
        self.tell(events.StepOpened(self.run, name, attempt, now_ms(), stage, planned.fingerprint, cache, {}))

    def closed(
        self, name: str, attempt: int, status: events.RunStatus, metrics: Mapping[str, float], tags: Mapping[str, str]
    ) -> None:
        """An attempt ended."""
        stage = self.plan.steps[name].step.stage
        config, params = stage.model_dump_json(indent=1), short_params(stage)
        self.tell(events.StepClosed(self.run, name, attempt, now_ms(), status, metrics, params, tags, config))

    def curves(self, name: str, attempt: int, points: list[tuple[str, float, int, int]]) -> None:
        """An attempt's curves grew."""
        self.tell(events.CurvePoints(self.run, name, attempt, tuple(points)))


def short_params(stage: Stage) -> dict[str, str]:
    """Return a stage's fields that fit a table's cell: numbers, words and flags, at most a dozen."""
    fields = {name: getattr(stage, name) for name in type(stage).model_fields}
    plain = {name: value for name, value in fields.items() if isinstance(value, str | int | float)}
    return {name: str(value)[:PARAM_CHARACTERS] for name, value in list(plain.items())[:NUM_PARAMS]}


def now_ms() -> int:
    """Return the time as MLflow counts it."""
    return int(time.time() * 1000)
