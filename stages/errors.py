"""The errors that users see: what failed, the offending value, what was expected, what to do.

    StillhouseError
    ├── ConfigError          the request is wrong; nothing was started      (exit code 2)
    │   └── ExternalDataError     data from outside is missing or out of reach   (exit code 2)
    └── StageFailed          a step's work failed; trying again gives the same
        ├── Transient        trying again may work (a lost connection, a busy device)
        │   └── WorkerLost   a process or node of it went away
        └── OutOfMemory      trying again with a smaller micro-batch may work

Each takes one message, and at most keywords beside it, so that default pickling carries it across Ray unchanged.
"""

from difflib import get_close_matches


class StillhouseError(Exception):
    """Base of all errors that stillhouse raises on purpose."""


class ConfigError(StillhouseError, ValueError):
    """The request is wrong: raised before any work starts."""


class ExternalDataError(ConfigError):
    """A file, folder or hub id that the request names is missing, unreadable or out of reach."""


class StageFailed(StillhouseError):
    """A step's work failed in a way that trying again would repeat."""


class Transient(StageFailed):
    """A step's work failed in a way that trying again may fix."""


class WorkerLost(Transient):
    """A process or node that worked on a step went away."""


class OutOfMemory(StageFailed):
    """The device's memory did not suffice; a smaller micro-batch may."""

    def __init__(self, message: str, *, micro_batch: int | None = None) -> None:
        """Say what failed, and with how many rows in one forward pass where that is known."""
        super().__init__(message)
        self.micro_batch = micro_batch


def nearest(name: str, known: list[str]) -> str:
    """Return the hint `; did you mean 'x'? (known: …)` for an unknown name."""
    close = get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{hint} (known: {', '.join(sorted(known))})"
