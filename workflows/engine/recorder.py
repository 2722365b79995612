"""Turns what happens to a run's steps into events."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from stages.contract import Stage
from workflows.engine.events import AttemptEnded, AttemptStarted, CurvePoints, RunEvent, RunStatus
from workflows.engine.plan import Plan
from workflows.engine.store import Commit

NUM_PARAMS = 12
PARAM_CHARACTERS = 60


@dataclass(frozen=True, slots=True)
class Recorder:
    """Records the attempts of one run's steps."""

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
                at_ms=now_ms(),
                stage=type(stage).__name__,
                fingerprint=planned.fingerprint,
                cache=cache,
                params=short_params(stage),
                config=stage.model_dump_json(indent=1),
            )
        )

    def closed(
        self, name: str, attempt: int, status: RunStatus, metrics: Mapping[str, float], tags: Mapping[str, str]
    ) -> None:
        """An attempt ended."""
        self.record(AttemptEnded(step=name, attempt=attempt, at_ms=now_ms(), status=status, metrics=metrics, tags=tags))

    def curves(self, name: str, attempt: int, points: list[tuple[str, float, int, int]]) -> None:
        """An attempt's curves grew."""
        whole = tuple((metric, value, int(step), at_ms) for metric, value, step, at_ms in points)
        self.record(CurvePoints(step=name, attempt=attempt, points=whole))


def short_params(stage: Stage) -> dict[str, str]:
    """Return a stage's fields that fit a table's cell: numbers, words and flags, at most a dozen."""
    fields = {name: getattr(stage, name) for name in type(stage).model_fields}
    plain = {name: value for name, value in fields.items() if isinstance(value, str | int | float)}
    return {name: str(value)[:PARAM_CHARACTERS] for name, value in list(plain.items())[:NUM_PARAMS]}


def now_ms() -> int:
    """Return the time as events count it."""
    return int(time.time() * 1000)
