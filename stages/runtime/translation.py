"""From what libraries raise to errors of ours. Knows their types by name: imports neither ray nor torch."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from stages.errors import OutOfMemory, StageFailed, StillhouseError, Transient, WorkerLost

__all__ = ["causes", "one_line", "translate", "within_memory"]

LOST = {
    "ActorDiedError",
    "ActorUnavailableError",
    "DistBackendError",
    "DistNetworkError",
    "DistStoreError",
    "NodeDiedError",
    "ObjectLostError",
    "OwnerDiedError",
    "PreemptionError",
    "RayActorError",
    "RayChannelError",
    "WorkerCrashedError",
    "WorkerGroupStartupFailedError",
    "WorkerGroupStartupTimeoutError",
    "WorkerHealthCheckFailedError",
    "WorkerHealthCheckTimeoutError",
}
"""Types of Ray and torch.distributed that mean that a process or node went away."""
LOST_SIGNS = ("Connection closed by peer", "Connection reset by peer", "Connection refused", "/gloo/")
"""What gloo and NCCL say on the living ranks when another died; they raise a plain RuntimeError."""
MEMORY = {"OutOfMemoryError", "MemoryError"}
MEMORY_SIGNS = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""What torch says, by a plain RuntimeError, where the host's allocator or a library on the device had no room."""
DISK_FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}
"""What an error number of the system means; libraries that are not Python's give its text only."""
LINE_CHARACTERS = 300
RAY_DATA_TAIL = re.compile(r"(\n|\\n)?Failed to apply UDF transform.*", re.DOTALL)
"""Ray Data's own advice, which it writes into the message of what a function of ours raised."""
RAY_DATA_MARK = "SystemException"
"""What Ray Data raises its errors from, without a message, to distinguish its own from a user's."""


def translate(error: BaseException) -> StillhouseError:
    """Return the error of ours that an error means, by it and everything that it wraps; its message is for people."""
    chain = list(causes(error))
    starved = next((link for link in chain if _is_out_of_memory(link)), None)
    if isinstance(error, OutOfMemory if starved else StillhouseError) and not hasattr(error, "cause"):
        return error
    if full := next(filter(None, map(_disk_full, reversed(chain))), None):
        return StageFailed(f"{full}; free space (`stillhouse artifacts gc`) and run the same command again")
    # Ray raises an error of a task as one that is of its type too, whose text is a whole traceback: use what it wraps.
    ours = next((link for link in chain if isinstance(link, StillhouseError) and not hasattr(link, "cause")), None)
    if starved is not None and not isinstance(ours, OutOfMemory):
        return OutOfMemory(one_line(starved))
    if isinstance(ours, OutOfMemory):
        return OutOfMemory(_own_text(ours), micro_batch=ours.micro_batch)
    if ours is not None:
        return type(ours)(_own_text(ours))
    lost = next((link for link in chain if _is_loss(link)), None)
    if lost is not None:
        return WorkerLost(f"a process or node that worked on it was lost ({one_line(lost)})")
    if any(isinstance(link, ConnectionError | TimeoutError) or _is_of_the_store(link) for link in chain):
        return Transient(one_line(_root(error)))
    return StageFailed(one_line(_root(error)))


@contextmanager
def within_memory(what: str, *, micro_batch: int | None = None, advice: str | None = None) -> Iterator[None]:
    """Raise `OutOfMemory` where the device or the host refuses an allocation.

    Args:
        what: what is being done, the message's subject.
        micro_batch: rows in one forward pass, where fewer would help.
        advice: what else to do about it.
    """
    try:
        yield
    except Exception as error:
        if not _is_out_of_memory(error):
            raise
        rows = f" with micro_batch={micro_batch}" if micro_batch else ""
        if micro_batch and advice is None:
            smaller = f"set resources.micro_batch below {micro_batch}"
            advice = smaller if micro_batch > 1 else "fewer rows there cannot be: use a device with more memory"
        message = f"{what} ran out of memory{rows} ({one_line(error)}){f'; {advice}' if advice else ''}"
        raise OutOfMemory(message, micro_batch=micro_batch) from error


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and what it wraps, the way Python, Ray's tasks and Ray Train's worker groups wrap."""
    seen: set[int] = set()
    todo = [error]
    while todo:
        link = todo.pop(0)
        if id(link) in seen:
            continue
        seen.add(id(link))
        yield link
        todo += _wrapped(link)
        if link.__context__ is not None and not link.__suppress_context__:
            todo.append(link.__context__)


def one_line(error: BaseException) -> str:
    """Return an error's type and the first line of its message; of one of ours the whole message."""
    text = _own_text(error).strip()
    if isinstance(error, StillhouseError):
        return text
    first, _, rest = text.partition("\n")
    if first.rstrip().endswith(":") and rest.strip():  # "GenerationConfig is invalid:", and only then what is
        first = f"{first.rstrip()} {rest.strip().splitlines()[0].strip()}"
    return f"{type(error).__name__}: {first[:LINE_CHARACTERS] or 'no message'}"


def _own_text(error: BaseException) -> str:
    return RAY_DATA_TAIL.sub("", str(error))


def _wrapped(error: BaseException) -> list[BaseException]:
    names = ("cause", "health_check_failure", "controller_failure", "_base_exc")
    found = [error.__cause__, *(getattr(error, name, None) for name in names)]
    found += getattr(error, "worker_failures", {}).values()
    return [link for link in found if isinstance(link, BaseException) and type(link).__name__ != RAY_DATA_MARK]


def _root(error: BaseException) -> BaseException:
    """Return the innermost error that was wrapped on purpose."""
    seen: set[int] = set()
    while (inner := _wrapped(error)) and id(error) not in seen:
        seen.add(id(error))
        error = inner[-1]
    return error


def _is_out_of_memory(error: BaseException) -> bool:
    if type(error).__name__ in MEMORY:
        return True
    # What only wraps or quotes such an error has its text too.
    own = isinstance(error, RuntimeError) and not hasattr(error, "cause")
    return own and any(sign in str(error) for sign in MEMORY_SIGNS)


def _disk_full(error: BaseException) -> str | None:
    """Return what is full, where that is what an error means, with the line of its text that says where."""
    for number, meaning in DISK_FULL.items():
        lines = [line.strip() for line in str(error).splitlines() if os.strerror(number) in line]
        if lines or (isinstance(error, OSError) and error.errno == number):
            return f"{meaning} ({(lines or [one_line(error)])[0][:LINE_CHARACTERS]})"
    return None


def _is_of_the_store(error: BaseException) -> bool:
    return type(error).__module__.startswith("obstore")


def _is_loss(error: BaseException) -> bool:
    by_name = type(error).__name__ in LOST
    return by_name or (not _is_of_the_store(error) and any(sign in str(error) for sign in LOST_SIGNS))
