"""Error → decision: whether a failed attempt is tried again, as it was or with less, and why. Pure."""

from dataclasses import dataclass
from enum import Enum

from stages.contract import Resources
from workflows.engine.graph import Retry


class FailureKind(Enum):
    """What ended an attempt; the value is how people read it."""

    PERMANENT = "failed"
    TRANSIENT = "failed for now"
    WORKER_LOST = "lost its worker"
    OUT_OF_MEMORY = "ran out of memory"
    PREEMPTED = "was preempted"
    TIMEOUT = "ran past its timeout"
    PENDING = "waited too long for its resources"
    FENCED = "was overtaken by another run"

    @property
    def retriable(self) -> bool:
        """Whether trying again may work."""
        return self not in (FailureKind.PERMANENT, FailureKind.PENDING)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an attempt ended without a commit."""

    kind: FailureKind
    message: str
    """For people: what failed and what to do."""


@dataclass(frozen=True, slots=True)
class TryAgain:
    """Try again after a wait, perhaps with smaller resources."""

    wait_seconds: float
    resources: Resources
    reason: str


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Do not try again."""

    reason: str


LONGEST_BACKOFF_SECONDS = 300.0
"""Backoff stops doubling here: an outage of an hour costs a dozen tries, not a night."""
SMALLEST_MICRO_BATCH = 1
FIRST_MICRO_BATCH = 8
"""Where shrinking starts when the stage had chosen its own micro-batch."""


def decide(failure: Failure, *, attempt: int, retry: Retry, resources: Resources) -> TryAgain | GiveUp:
    """Decide what follows a failed attempt (counted from 1)."""
    if not failure.kind.retriable:
        return GiveUp("not tried again, since the same would happen")
    if attempt >= retry.attempts:
        return GiveUp(f"given up: it {failure.kind.value} at attempt {attempt} of {retry.attempts}")
    wait = (
        0.0
        if failure.kind is FailureKind.PREEMPTED
        else min(retry.backoff_seconds * 2 ** (attempt - 1), LONGEST_BACKOFF_SECONDS)
    )
    reason = f"it {failure.kind.value} at attempt {attempt} of {retry.attempts}"
    if failure.kind is not FailureKind.OUT_OF_MEMORY:
        return TryAgain(wait, resources, reason)
    if resources.micro_batch == SMALLEST_MICRO_BATCH:
        return GiveUp(
            f"given up: {reason} with a micro-batch of {SMALLEST_MICRO_BATCH} row, which cannot be made smaller"
        )
    smaller = resources.micro_batch // 2 if resources.micro_batch else FIRST_MICRO_BATCH
    return TryAgain(
        wait,
        resources.model_copy(update={"micro_batch": smaller}),
        f"{reason}; micro-batch {resources.micro_batch or 'of the stage'} → {smaller} rows",
    )
