"""The engine's state machine: events in, decisions out. Pure: no clock, no Ray, no store.

`advance(schedule, event)` returns the next schedule and what the driver must do. Every event carries its time in
seconds (any monotonic clock). The promises, held by tests over random graphs and crash points:

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
    """Where a step stands; `over` phases are never left."""

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
    attempt: int = 0
    """Attempts launched so far."""
    shrinks: int = 0
    """How many of them ran out of memory, which counts against no limit but the smallest micro-batch."""
    not_before: float = 0.0
    launched_at: float = 0.0
    began_at: float | None = None
    """When the attempt's work had its resources; None while it waits for them."""
    stopping: Failure | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Capacity:
    """What the cluster has for steps."""

    cpus: float
    gpus: float


@dataclass(frozen=True, slots=True)
class Schedule:
    """Every step's state."""

    steps: Mapping[str, StepState]
    capacity: Capacity
    interrupted: bool = False

    @property
    def over(self) -> bool:
        """Whether nothing is left to do."""
        return all(state.phase.over for state in self.steps.values())

    @property
    def succeeded(self) -> bool:
        """Whether every required step is committed."""
        return all(state.phase is Phase.COMMITTED for state in self.steps.values() if state.required)


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""

    at: float


@dataclass(frozen=True, slots=True)
class Began:
    """A running attempt's work has its resources."""

    step: str
    at: float


@dataclass(frozen=True, slots=True)
class Committed:
    """A step's artifact is committed, by this run or by another that held it."""

    step: str
    at: float


@dataclass(frozen=True, slots=True)
class Postponed:
    """A step could not be launched yet, which costs no attempt: a live run holds its claim, or the store fails."""

    step: str
    at: float
    phase: Phase
    """`HELD` or `BACKING_OFF`."""
    reason: str
    wait_seconds: float


@dataclass(frozen=True, slots=True)
class Failed:
    """An attempt ended without a commit."""

    step: str
    at: float
    failure: Failure


@dataclass(frozen=True, slots=True)
class Overtaken:
    """Another run took a running step over: its attempt works for nothing."""

    step: str
    at: float


@dataclass(frozen=True, slots=True)
class Interrupted:
    """A person pressed Ctrl-C, or the job was asked to stop."""

    at: float


Event = Tick | Began | Committed | Postponed | Failed | Overtaken | Interrupted


@dataclass(frozen=True, slots=True)
class Launch:
    """Start an attempt."""

    step: str
    attempt: int
    resources: Resources


@dataclass(frozen=True, slots=True)
class Stop:
    """End a running attempt; `Failed` must follow once it has ended."""

    step: str
    reason: str


@dataclass(frozen=True, slots=True)
class Transition:
    """A step is over without a commit, or waits for another attempt: people want to know why."""

    step: str
    phase: Phase
    reason: str


Decision = Launch | Stop | Transition


def new_schedule(
    steps: Mapping[str, Step],
    *,
    committed: frozenset[str],
    capacity: Capacity,
    blocked: Mapping[str, str] | None = None,
) -> Schedule:
    """Return the schedule of a run that has some steps committed already; `blocked` steps cannot run: name → why."""
    blocked = blocked or {}
    states = {
        name: StepState(
            name=name,
            needs=step.needs(),
            resources=step.resources,
            retry=step.retry,
            required=step.required,
            phase=Phase.COMMITTED if name in committed else Phase.SKIPPED if name in blocked else Phase.WAITING,
            reason=blocked.get(name, ""),
        )
        for name, step in steps.items()
    }
    return Schedule(states, capacity)


def advance(schedule: Schedule, event: Event) -> tuple[Schedule, list[Decision]]:
    """Take one event and return the next schedule and what follows from it."""
    draft = _Draft(dict(schedule.steps), schedule.capacity, schedule.interrupted)
    match event:
        case Began(step, at):
            draft.update(step, began_at=at)
        case Committed(step):
            draft.update(step, phase=Phase.COMMITTED, stopping=None)
        case Postponed(step, at, phase, reason, wait):
            draft.settle(step, phase, reason, not_before=at + wait, attempt=draft.steps[step].attempt - 1)
        case Failed(step, at, failure):
            _fail(draft, step, at, failure)
        case Overtaken(step):
            draft.stop(step, Failure(FailureKind.FENCED, "another run took it over while it ran"))
        case Interrupted():
            _interrupt(draft)
        case Tick(at):
            _stop_overdue(draft, at)
    if not draft.interrupted:
        _skip_unreachable(draft)
        _launch_ready(draft, event.at)
    return Schedule(draft.steps, draft.capacity, draft.interrupted), draft.decisions


@dataclass(slots=True)
class _Draft:
    """A schedule being advanced."""

    steps: dict[str, StepState]
    capacity: Capacity
    interrupted: bool
    decisions: list[Decision] = field(default_factory=list)

    def update(self, name: str, **changes: Any) -> None:
        self.steps[name] = replace(self.steps[name], **changes)

    def settle(self, name: str, phase: Phase, reason: str, **changes: Any) -> None:
        self.update(name, phase=phase, reason=reason, **changes)
        self.decisions.append(Transition(name, phase, reason))

    def stop(self, name: str, failure: Failure) -> None:
        if self.steps[name].phase is Phase.RUNNING:
            self.update(name, phase=Phase.STOPPING, stopping=failure)
            self.decisions.append(Stop(name, failure.message))

    def in_phase(self, *phases: Phase) -> Iterator[StepState]:
        return (state for state in list(self.steps.values()) if state.phase in phases)


def _fail(draft: _Draft, name: str, at: float, failure: Failure) -> None:
    state = draft.steps[name]
    failure = state.stopping or failure  # what we stopped it for, not how it died of that
    if draft.interrupted:
        draft.settle(name, Phase.CANCELLED, "the run was interrupted", stopping=None)
        return
    counted = state.attempt - state.shrinks
    decision = decide(failure, attempt=counted, retry=state.retry, resources=state.resources)
    if isinstance(decision, TryAgain):
        reason = f"{decision.reason}, next in {decision.wait_seconds:.0f} s: {failure.message}"
        draft.settle(
            name,
            Phase.BACKING_OFF,
            reason,
            not_before=at + decision.wait_seconds,
            resources=decision.resources,
            shrinks=state.shrinks + (failure.kind is FailureKind.OUT_OF_MEMORY),
            stopping=None,
            began_at=None,
        )
    else:
        draft.settle(name, Phase.FAILED, f"{failure.message} ({decision.reason})", stopping=None)


def _interrupt(draft: _Draft) -> None:
    draft.interrupted = True
    for state in draft.in_phase(Phase.RUNNING):
        draft.update(state.name, phase=Phase.STOPPING)
        draft.decisions.append(Stop(state.name, "the run was interrupted"))
    for state in draft.in_phase(Phase.WAITING, Phase.BACKING_OFF, Phase.HELD):
        draft.settle(state.name, Phase.CANCELLED, "the run was interrupted")


def _stop_overdue(draft: _Draft, at: float) -> None:
    for state in draft.in_phase(Phase.RUNNING):
        retry, res = state.retry, state.resources
        ran, waited = at - (state.began_at or state.launched_at), at - state.launched_at
        if state.began_at is None and waited > retry.pending_timeout_seconds:
            gpus = f" + {res.gpus_per_worker:g} GPU" if res.gpus_per_worker else ""
            need = f"{res.workers} × {res.cpus_per_worker:g} CPU{gpus}"
            text = f"after {waited:.0f} s its work had not begun; it asks for {need}. Free these on the cluster, ask "
            text += "for less, or raise the step's pending_timeout_seconds"
            draft.stop(state.name, Failure(FailureKind.PENDING, text))
        elif state.began_at is not None and retry.timeout_seconds is not None and ran > retry.timeout_seconds:
            text = f"{ran:.0f} s of at most {retry.timeout_seconds:.0f} s (timeout_seconds)"
            draft.stop(state.name, Failure(FailureKind.TIMEOUT, text))


def _skip_unreachable(draft: _Draft) -> None:
    changed = True
    while changed:
        changed = False
        for state in draft.in_phase(Phase.WAITING):
            lost = sorted(need for need in state.needs if draft.steps[need].phase in (Phase.FAILED, Phase.SKIPPED))
            if lost:
                became = "failed" if draft.steps[lost[0]].phase is Phase.FAILED else "was skipped"
                draft.settle(state.name, Phase.SKIPPED, f"it needs {lost[0]}, which {became}")
                changed = True


def _launch_ready(draft: _Draft, at: float) -> None:
    busy = list(draft.in_phase(Phase.RUNNING, Phase.STOPPING))
    cpus = draft.capacity.cpus - sum(state.resources.total_cpus for state in busy)
    gpus = draft.capacity.gpus - sum(state.resources.total_gpus for state in busy)
    num_busy = len(busy)
    for state in draft.in_phase(Phase.WAITING, Phase.BACKING_OFF, Phase.HELD):
        if state.not_before > at or any(draft.steps[need].phase is not Phase.COMMITTED for need in state.needs):
            continue
        need = state.resources
        if num_busy and (need.total_cpus > cpus or need.total_gpus > gpus):
            continue
        cpus, gpus, num_busy = cpus - need.total_cpus, gpus - need.total_gpus, num_busy + 1
        attempt = state.attempt + 1
        draft.update(state.name, phase=Phase.RUNNING, attempt=attempt, launched_at=at, began_at=None, reason="")
        draft.decisions.append(Launch(state.name, attempt, need))
