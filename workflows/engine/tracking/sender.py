"""Sends a journal to MLflow, batch after batch, and goes on where an earlier sender was killed.

Promises: a batch is marked sent after all of it is in MLflow; what fails is tried again, carefully: each MLflow run is
looked for before it is made. What MLflow will never take is refused with a warning and does not hold up the rest.
Does not: import MLflow, which it is handed opened.
"""

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from workflows.engine.events import CandidateFound, RunClosed, RunEvent, VerdictReached
from workflows.engine.redaction import redacted
from workflows.engine.tracking.journal import Journal
from workflows.engine.tracking.mlflow_store import MlflowStore
from workflows.engine.tracking.view import Entry, Row, coalesce

__all__ = ["Sender", "follow"]

logger = logging.getLogger(__name__)

BACKOFF_SECONDS = (1.0, 2.0, 5.0, 15.0, 60.0)
"""Pauses after the first, second, … failure while the run goes on."""
CLOSING_TRIES = 3
CLOSING_PAUSE_SECONDS = 1.0
"""Tries, and the pause between them, once the run is over: longer outages are for the next run's replay."""
RECORDS_AT_ONCE = 2000
"""How many waiting records are told, and marked as sent, together."""
REFUSALS = frozenset(
    {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "MALFORMED_REQUEST", "RESOURCE_DOES_NOT_EXIST", "INVALID_STATE"}
)
"""MLflow's error codes for what it will never take."""


class Sender:
    """Sends one run's journal. Not for several threads at once."""

    def __init__(
        self,
        run: str,
        journal: Journal,
        books: Callable[[], MlflowStore],
        turn: Callable[[], AbstractContextManager[object]],
    ) -> None:
        """Stand ready to send.

        Args:
            run: the journal's run.
            journal: held by this process.
            books: opens MLflow; asked when there is something to send, and again after it failed.
            turn: held while what several runs share, candidates and the registry, is told.
        """
        self._run, self._journal, self._open, self._turn = run, journal, books, turn
        self._books: MlflowStore | None = None
        self._waiting: deque[int] = deque()
        self._last_ms = 0
        self._ended = False
        self.num_sent = 0
        """Records that this sender brought into MLflow."""
        self.num_refused = 0
        """Records that MLflow will never take."""

    def add(self, numbers: Iterable[int]) -> None:
        """Add batches to send."""
        self._waiting.extend(numbers)

    def send(self) -> None:
        """Tell MLflow every batch that waits.

        Raises:
            Exception: MLflow or the journal cannot be reached; what was not marked as sent still waits.
        """
        try:
            while self._waiting:
                numbers, records = self._next()
                refused = self._tell(records)
                self._journal.mark_sent(numbers[-1])
                for _ in numbers:
                    self._waiting.popleft()
                self.num_sent += len(records) - refused
                self.num_refused += refused
        except Exception:
            if self._books is not None:
                self._books.careful = True
            raise
        if self._books is not None:
            self._books.careful = False

    def catch_up(self) -> list[int]:
        """Send all that is journaled and not sent, told of or not; return the numbers of all batches.

        Raises:
            Exception: as `send`.
        """
        numbers, sent = self._journal.numbers(), self._journal.sent()
        self._waiting = deque(number for number in numbers if number > sent)
        self.send()
        return numbers

    def finish(self) -> None:
        """Catch up and end what the run has left open in MLflow, once its driver is gone.

        Raises:
            Exception: as `send`.
        """
        numbers = self.catch_up()
        if numbers and not self._ended:
            self._note(self._journal.read(numbers[-1]))
        if numbers and not self._ended:
            self._opened().settle(self._run, self._last_ms)
        self._journal.finish()

    def _next(self) -> tuple[list[int], list[RunEvent]]:
        numbers: list[int] = []
        records: list[RunEvent] = []
        for number in self._waiting:
            numbers.append(number)
            records += self._journal.read(number)
            if len(records) >= RECORDS_AT_ONCE:
                break
        return numbers, records

    def _opened(self) -> MlflowStore:
        if self._books is None:
            books = self._open()
            books.meet(self._journal.read(self._journal.numbers()[0]))
            self._books = books
        return self._books

    def _tell(self, records: list[RunEvent]) -> int:
        """Tell MLflow records; return how many of them it refused."""
        books, refused = self._opened(), 0
        books.meet(records)
        self._note(records)
        shared = any(isinstance(record, CandidateFound | VerdictReached) for record in records)
        with self._turn() if shared else nullcontext():
            for entry in coalesce(records):
                refused += _tell_or_refuse(books, entry)
        return refused

    def _note(self, records: list[RunEvent]) -> None:
        self._ended |= any(isinstance(record, RunClosed) for record in records)
        self._last_ms = max([self._last_ms, *(_at_ms(record) for record in records)])


def follow(sender: Sender, lines: Iterable[str], answer: Callable[[Mapping[str, Any]], None]) -> None:
    """Send the batches whose numbers come in, until no more come; then try a few times more, and finish.

    Args:
        sender: sends the run's journal.
        lines: numbers of batches, as they are journaled; their end is the driver's end.
        answer: is told how far the sender is, after each try.
    """
    inbox: queue.SimpleQueue[int | None] = queue.SimpleQueue()

    def read() -> None:
        for line in lines:
            inbox.put(int(line))
        inbox.put(None)

    threading.Thread(target=read, name="numbers", daemon=True).start()
    over, failures, tries_at_end = False, 0, 0
    while tries_at_end < CLOSING_TRIES:
        if over:
            time.sleep(CLOSING_PAUSE_SECONDS)
        else:
            over = _gather(
                sender, inbox, BACKOFF_SECONDS[min(failures, len(BACKOFF_SECONDS)) - 1] if failures else None
            )
        tries_at_end += over
        error = _try(sender, finish=over)
        failures = 0 if error is None else failures + 1
        answer({"sent": sender.num_sent, "refused": sender.num_refused, "error": error})
        if over and error is None:
            return


def _gather(sender: Sender, inbox: "queue.SimpleQueue[int | None]", pause_seconds: float | None) -> bool:
    """Hand the sender what comes within the pause, or, without one, the next batch and all that came with it.

    Returns:
        Whether no more will come.
    """
    until = None if pause_seconds is None else time.monotonic() + pause_seconds
    while True:
        try:
            number = inbox.get(timeout=None if until is None else max(0.0, until - time.monotonic()))
        except queue.Empty:
            return False
        if number is None:
            return True
        sender.add([number])
        until = until or time.monotonic()


def _try(sender: Sender, *, finish: bool) -> str | None:
    """Send what waits; return why that failed, or None."""
    try:
        sender.finish() if finish else sender.send()
    except Exception as error:  # noqa: BLE001  the border of the sender's process: the journal keeps everything
        return redacted(str(error)) or type(error).__name__
    return None


def _tell_or_refuse(books: MlflowStore, entry: Entry) -> int:
    """Tell MLflow an entry; return how many records it refused."""
    for last in (False, True):  # a run of another store may have changed what we share under our hands: look again
        try:
            books.tell(entry)
            return 0
        except Exception as error:
            if not _is_refusal(error):
                raise
            if last:
                logger.warning("MLflow does not take %s: %s", _described(entry), redacted(str(error)))
    return entry.num_records if isinstance(entry, Row) else 1


def _at_ms(record: RunEvent) -> int:
    times = [point[3] for point in record.points] if hasattr(record, "points") else [record.at_ms]
    return max(times, default=0)


def _is_refusal(error: Exception) -> bool:
    """Tell whether MLflow, or a flaw in a record, will make the same entry fail each time."""
    flaws = TypeError | ValueError | LookupError | AttributeError
    return getattr(error, "error_code", None) in REFUSALS or isinstance(error, flaws)


def _described(entry: Entry) -> str:
    return f"the row of {entry.key}" if isinstance(entry, Row) else f"the {type(entry).__name__} of {entry.run}"
