"""The engine's state machine: events in, states out. Pure: no clock, no Ray, no store.

`advance(schedule, event)` returns the next schedule, whose `entered` says what the driver must do. Every event carries
its time in seconds (any monotonic clock). The promises, held by tests over random graphs and crash points:

- a step is launched only after everything it needs is committed, and never after it is committed itself;
- the declared resources of the running steps fit the cluster (a step larger than the cluster runs alone: planning
  has refused it before where that can be known);
- a failed step skips what needs it, and nothing else; independent branches go on;
- after an interruption nothing is launched.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from stages.contract import Resources
from workflows.engine.failures import Failure, FailureKind, TryAgain, decide
from workflows.engine.graph import Retry, Step


class Phase(Enum):
    """Where a step stands; `over` phases are never left.

    A step that enters RUNNING is to be launched, one that enters STOPPING to be ended: then `Failed` must follow.
    """

    WAITING = "waiting"
    BACKING_OFF = "backing off"
    HELD = "held by another run"
    RUNNING = "running"
    STOPPING = "stopping"
    COMMITTED = "committed"
    FAILED = "failed"
    SKIPPED = "skipped"
    CANCELLED = "cancelled"

    @property
    def over(self) -> bool:
        """Whether the step is done with."""
        return self in (Phase.COMMITTED, Phase.FAILED, Phase.SKIPPED, Phase.CANCELLED)


@dataclass(frozen=True, slots=True)
class StepState:
    """One step's place in the schedule."""

    name: str
    needs: frozenset[str]
    resources: Resources
    retry: Retry
    required: bool
    phase: Phase = Phase.WAITING
    reason: str = ""
    """Why it is in this phase, for people."""
    attempt: int = 0
    """Attempts launched so far."""
    shrinks: int = 0
    """How many of them ran out of memory, which counts against no limit but the smallest micro-batch."""
    not_before: float = 0.0
    launched_at: float = 0.0
    began_at: float | None = None
    """When the attempt's work had its resources; None while it waits for them."""
    stopping: Failure | None = None


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""

    at: float


class Interrupted(Tick):
    """A person pressed Ctrl-C, or the job was asked to stop."""


@dataclass(frozen=True, slots=True)
class _StepEvent:
    step: str
    at: float


class Began(_StepEvent):
    """A running attempt's work has its resources."""


class Overtaken(_StepEvent):
    """Another run took a running step over: its attempt works for nothing."""


@dataclass(frozen=True, slots=True)
class Committed(_StepEvent):
    """A step's artifact is committed, by this run or by another that held it."""

    reason: str = ""


@dataclass(frozen=True, slots=True)
class Postponed(_StepEvent):
    """A step could not be launched yet, which costs no attempt: a live run holds its claim, or the store fails."""

    phase: Phase
    """`HELD` or `BACKING_OFF`."""
    reason: str
    wait_seconds: float


@dataclass(frozen=True, slots=True)
class Failed(_StepEvent):
    """An attempt ended without a commit."""

    failure: Failure


Event = Tick | Began | Overtaken | Committed | Postponed | Failed


@dataclass(frozen=True, slots=True)
class Schedule:
    """Every step's state, and what the cluster has for them."""

    steps: dict[str, StepState]
    cpus: float
    gpus: float
    interrupted: bool = False
    entered: list[StepState] = field(default_factory=list)
    """The states that steps entered by the last event, in order."""

    @property
    def over(self) -> bool:
        """Whether nothing is left to do."""
        return all(state.phase.over for state in self.steps.values())

    @property
    def succeeded(self) -> bool:
        """Whether every required step is committed."""
        return all(state.phase is Phase.COMMITTED for state in self.steps.values() if state.required)

    def in_phase(self, *phases: Phase) -> Iterator[StepState]:
        """Yield the steps that stood in some phases when this was asked."""
        return (state for state in list(self.steps.values()) if state.phase in phases)


def new_schedule(
    steps: Mapping[str, Step],
    *,
    committed: frozenset[str],
    cpus: float,
    gpus: float,
    blocked: Mapping[str, str] | None = None,
) -> Schedule:
    """Return the schedule of a run that has some steps committed already; `blocked` steps cannot run: name → why."""
    states = {
        name: StepState(name, step.needs(), step.resources, step.retry, step.required) for name, step in steps.items()
    }
    for name in committed:
        states[name] = replace(states[name], phase=Phase.COMMITTED)
    for name, why in (blocked or {}).items():
        states[name] = replace(states[name], phase=Phase.SKIPPED, reason=why)
    return Schedule(states, cpus, gpus)


def advance(schedule: Schedule, event: Event) -> Schedule:
    """Take one event and return the next schedule."""
    interrupted = schedule.interrupted or isinstance(event, Interrupted)
    draft = replace(schedule, steps=dict(schedule.steps), interrupted=interrupted, entered=[])
    match event:
        case Began(step, at):
            draft.steps[step] = replace(draft.steps[step], began_at=at)
        case Committed(step, _, reason):
            _enter(draft, step, Phase.COMMITTED, reason)
        case Postponed(step, at, phase, reason, wait):
            _enter(draft, step, phase, reason, not_before=at + wait, attempt=draft.steps[step].attempt - 1)
        case Failed(step, at, failure):
            _fail(draft, step, at, failure)
        case Overtaken(step):
            _stop(draft, step, Failure(FailureKind.FENCED, "another run took it over while it ran"))
        case Interrupted():
            for state in draft.in_phase(Phase.RUNNING):
                _enter(draft, state.name, Phase.STOPPING, "the run was interrupted")
            for state in draft.in_phase(Phase.WAITING, Phase.BACKING_OFF, Phase.HELD):
                _enter(draft, state.name, Phase.CANCELLED, "the run was interrupted")
        case Tick(at):
            _stop_overdue(draft, at)
    if not draft.interrupted:
        _skip_unreachable(draft)
        _launch_ready(draft, event.at)
    return draft


def _enter(draft: Schedule, name: str, phase: Phase, reason: str = "", **changes: Any) -> None:
    draft.steps[name] = replace(draft.steps[name], phase=phase, reason=reason, **changes)
    draft.entered.append(draft.steps[name])


def _stop(draft: Schedule, name: str, failure: Failure) -> None:
    if draft.steps[name].phase is Phase.RUNNING:
        _enter(draft, name, Phase.STOPPING, failure.message, stopping=failure)


def _fail(draft: Schedule, name: str, at: float, failure: Failure) -> None:
    state = draft.steps[name]
    failure = state.stopping or failure  # what we stopped it for, not how it died of that
    if draft.interrupted:
        _enter(draft, name, Phase.CANCELLED, "the run was interrupted")
        return
    counted = state.attempt - state.shrinks
    decision = decide(failure, attempt=counted, retry=state.retry, resources=state.resources)
    if isinstance(decision, TryAgain):
        _enter(
            draft,
            name,
            Phase.BACKING_OFF,
            f"{decision.reason}, next in {decision.wait_seconds:.0f} s: {failure.message}",
            not_before=at + decision.wait_seconds,
            resources=decision.resources,
            shrinks=state.shrinks + (failure.kind is FailureKind.OUT_OF_MEMORY),
        )
    else:
        _enter(draft, name, Phase.FAILED, f"{failure.message} ({decision.reason})")


def _stop_overdue(draft: Schedule, at: float) -> None:
    for state in draft.in_phase(Phase.RUNNING):
        if state.began_at is None:
            if (waited := at - state.launched_at) > state.retry.pending_timeout_seconds:
                text = f"after {waited:.0f} s its work had not begun; it asks for {state.resources.demand}. Free these "
                text += "on the cluster, ask for less, or raise the step's pending_timeout_seconds"
                _stop(draft, state.name, Failure(FailureKind.PENDING, text))
        elif (limit := state.retry.timeout_seconds) is not None and (ran := at - state.began_at) > limit:
            text = f"{ran:.0f} s of at most {limit:.0f} s (timeout_seconds)"
            _stop(draft, state.name, Failure(FailureKind.TIMEOUT, text))


def _skip_unreachable(draft: Schedule) -> None:
    changed = True
    while changed:
        changed = False
        for state in draft.in_phase(Phase.WAITING):
            lost = sorted(need for need in state.needs if draft.steps[need].phase in (Phase.FAILED, Phase.SKIPPED))
            if lost:
                became = "failed" if draft.steps[lost[0]].phase is Phase.FAILED else "was skipped"
                _enter(draft, state.name, Phase.SKIPPED, f"it needs {lost[0]}, which {became}")
                changed = True


def _launch_ready(draft: Schedule, at: float) -> None:
    busy = list(draft.in_phase(Phase.RUNNING, Phase.STOPPING))
    cpus = draft.cpus - sum(state.resources.total_cpus for state in busy)
    gpus = draft.gpus - sum(state.resources.total_gpus for state in busy)
    num_busy = len(busy)
    for state in draft.in_phase(Phase.WAITING, Phase.BACKING_OFF, Phase.HELD):
        if state.not_before > at or any(draft.steps[need].phase is not Phase.COMMITTED for need in state.needs):
            continue
        need = state.resources
        if num_busy and (need.total_cpus > cpus or need.total_gpus > gpus):
            continue
        cpus, gpus, num_busy = cpus - need.total_cpus, gpus - need.total_gpus, num_busy + 1
        attempt = state.attempt + 1
        _enter(draft, state.name, Phase.RUNNING, attempt=attempt, launched_at=at, began_at=None, stopping=None)
