"""The one lock of the program: the right to do what one process at a time may do, as create-only objects in a folder.

    <folder>/claims/<term>.json     create-only: who holds this term; the highest term may write
            /released/<term>.json   its holder is done with it, though it may live on

The right to write a fingerprint's next commit is one, to publish a run's events another.

Promises: a term has one holder; the next term is given when the holder releases it or is dead (`heartbeat`), at once
where that can be seen from here, never before. A claim that a power cut tore counts as a dead holder's.
Does not: stop a holder that was paused for longer than its run's heartbeat may be still. Whoever writes under a lease
therefore checks `latest` before, and puts what must be unique under a create-only name.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from stages.storage import AlreadyExists, Entry, Folder
from workflows.engine.heartbeat import Holder, Liveness

POLL_SECONDS = 0.1
PATIENCE_SECONDS = 60.0


class Lease:
    """The terms of one right."""

    def __init__(self, folder: Folder, liveness: Liveness) -> None:
        self._folder, self._liveness = folder, liveness

    def acquire(self, holder: Holder, *, renew: bool = False) -> int | Holder:
        """Begin a term and return its number, or return who holds the lease.

        With `renew`, a term that the same run holds is no hindrance: the new one overtakes it.
        """
        while True:
            term, held_by = self._look()
            if held_by is not None and not (renew and held_by.run == holder.run):
                return held_by
            try:
                self._folder.put_json(f"claims/{term + 1:06d}.json", holder.to_json(), durable=True)
            except AlreadyExists:
                continue  # another process was faster: look at it
            return term + 1

    def release(self, term: int) -> None:
        """End a term, so that the next holder need not wait for this process to die; again is as good as once."""
        with suppress(AlreadyExists):
            self._folder.put_json(f"released/{term:06d}.json", {}, create=True)

    def holder(self) -> Holder | None:
        """Return who holds the lease, or None where nobody alive does."""
        return self._look()[1]

    def latest(self) -> int:
        """Return the highest term, 0 before the first."""
        return max((number_of(entry) for entry in self._claims()), default=0)

    @contextmanager
    def held(self, holder: Holder) -> Iterator[int]:
        """Wait for the lease, hold it and release it; the objects of earlier terms are deleted.

        Raises:
            TimeoutError: another process held it for `PATIENCE_SECONDS`.
        """
        deadline = time.monotonic() + PATIENCE_SECONDS
        while isinstance(term := self.acquire(holder), Holder) or term != self.latest():  # two terms may have passed
            if time.monotonic() > deadline:
                raise TimeoutError(f"another process held {self._folder.uri} for more than {PATIENCE_SECONDS:g} s")
            time.sleep(POLL_SECONDS)
        try:
            for folder in (self._folder / "claims", self._folder / "released"):
                folder.delete([entry.name for entry in folder.entries() if number_of(entry) < term])
            yield term
        finally:
            self.release(term)

    def _look(self) -> tuple[int, Holder | None]:
        """Return the highest term and who holds it, or None where it was released or its holder is dead."""
        claims = self._claims()
        if not claims:
            return 0, None
        term, since = number_of(claims[-1]), claims[-1].modified
        if self._folder.has(f"released/{term:06d}.json"):
            return term, None
        found = self._folder.find_json(f"claims/{term:06d}.json")
        if found is None and not self._folder.has(f"claims/{term:06d}.json"):
            return self._look()  # deleted meanwhile: there is a later term
        holder = Holder.from_json(found)
        return term, holder if holder is not None and self._liveness.alive(holder, since=since) else None

    def _claims(self) -> list[Entry]:
        return (self._folder / "claims").entries()


def number_of(entry: Entry) -> int:
    """Return the number of an object `<number>.json`."""
    return int(entry.name.removesuffix(".json"))
