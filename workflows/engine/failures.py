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
    micro_batch: int | None = None
    """Rows in one forward pass with which memory did not suffice, where that is known."""


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


def decide(failure: Failure, *, attempt: int, retry: Retry, resources: Resources) -> TryAgain | GiveUp:
    """Decide what follows a failed attempt (counted from 1).

    Out of memory is tried again with half the rows until one row does not fit, however many attempts that takes.
    """
    if not failure.kind.retriable:
        return GiveUp("not tried again, since the same would happen")
    wait = min(retry.backoff_seconds * 2 ** (attempt - 1), LONGEST_BACKOFF_SECONDS)
    reason = f"it {failure.kind.value} at attempt {attempt}"
    if failure.kind is FailureKind.OUT_OF_MEMORY:
        tried = min((rows for rows in (failure.micro_batch, resources.micro_batch) if rows), default=None)
        if tried == 1:
            return GiveUp(f"given up: {reason} with a micro-batch of 1 row, which cannot be made smaller")
        rows = tried // 2 if tried else 1  # a worker that the system killed could not say how many rows it had
        text = f"{reason}; micro-batch {tried or 'of the stage'} → {rows} rows"
        return TryAgain(wait, resources.model_copy(update={"micro_batch": rows}), text)
    if attempt >= retry.attempts:
        return GiveUp(f"given up: {reason} of {retry.attempts}")
    return TryAgain(0.0 if failure.kind is FailureKind.PREEMPTED else wait, resources, f"{reason} of {retry.attempts}")
