"""The sender tries again after failures, refuses what can never be told, and finishes when the driver is gone."""

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from workflows.engine.tracking.journal import Journal
from workflows.engine.tracking.sender import Sender, follow

from stages.storage import Folder
from tests.workflows.engine.tracking.nights import night
from workflows.engine.events import RunEvent, RunOpened
from workflows.engine.tracking import sender as sender_module
from workflows.engine.tracking.view import Entry, Row


class FakeBooks:
    """Remembers entries; fails as it is told to."""

    def __init__(self, *, outages: int = 0, flaw: str = "") -> None:
        self.told: list[Entry] = []
        self.outages, self.flaw = outages, flaw
        self.careful = False
        self.was_careful: list[bool] = []
        self.settled: list[tuple[str, int]] = []

    def meet(self, records: list[RunEvent]) -> None:
        assert not records or any(isinstance(record, RunOpened) for record in records) or self.told

    def tell(self, entry: Entry) -> None:
        if self.outages:
            self.outages -= 1
            raise ConnectionError("no answer from https://me:pw@mlflow")
        if isinstance(entry, Row) and self.flaw and self.flaw in entry.key:
            raise ValueError("MLflow will never take this")
        self.was_careful.append(self.careful)
        self.told.append(entry)

    def settle(self, run: str, at_ms: int) -> None:
        self.settled.append((run, at_ms))


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(Folder.at(tmp_path) / "ledger")


def sender_of(journal: Journal, books: FakeBooks) -> Sender:
    return Sender("r", journal, lambda: books, nullcontext)  # type: ignore[arg-type, return-value]


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sender_module, "BACKOFF_SECONDS", (0.0,))
    monkeypatch.setattr(sender_module, "CLOSING_PAUSE_SECONDS", 0.0)


def test_send_after_failure_looks_before_it_makes(journal: Journal) -> None:
    books = FakeBooks(outages=1)
    sender = sender_of(journal, books)
    sender.add([journal.append(night("r"))])
    with pytest.raises(ConnectionError):
        sender.send()
    assert journal.sent() == 0
    sender.send()
    assert set(books.was_careful) == {True}
    assert not books.careful
    assert (sender.num_sent, sender.num_refused, journal.sent()) == (len(night("r")), 0, 1)


def test_send_flawed_record_does_not_hold_up_the_rest(journal: Journal) -> None:
    books = FakeBooks(flaw="teacher")
    sender = sender_of(journal, books)
    sender.add([journal.append(night("r"))])
    sender.send()
    assert sender.num_refused == 3
    assert sender.num_sent == len(night("r")) - 3
    assert journal.sent() == 1


def test_follow_outage_at_the_end_gives_up_and_keeps_the_journal(journal: Journal) -> None:
    answers: list[Mapping[str, Any]] = []
    number = journal.append(night("r"))
    follow(sender_of(journal, FakeBooks(outages=99)), [f"{number}\n"], answers.append)
    assert answers[-1] == {"sent": 0, "refused": 0, "error": "no answer from https://***@mlflow"}
    assert (journal.sent(), journal.finished()) == (0, False)


def test_follow_closed_run_is_finished_without_settling(journal: Journal) -> None:
    books, answers = FakeBooks(outages=1), []
    numbers = [journal.append(night("r")[:5]), journal.append(night("r")[5:])]
    follow(sender_of(journal, books), [f"{number}\n" for number in numbers], answers.append)
    assert answers[-1] == {"sent": len(night("r")), "refused": 0, "error": None}
    assert journal.finished()
    assert books.settled == []


def test_follow_killed_driver_leaves_no_run_open(journal: Journal) -> None:
    books = FakeBooks()
    number = journal.append(night("r")[:6])
    follow(sender_of(journal, books), [f"{number}\n"], lambda _: None)
    assert books.settled == [("r", 1290)]
    assert journal.finished()


def test_follow_batches_journaled_by_a_killed_driver_and_not_told_of_are_sent(journal: Journal) -> None:
    books = FakeBooks()
    first = journal.append(night("r")[:6])
    journal.append(night("r")[6:])
    follow(sender_of(journal, books), [f"{first}\n"], lambda _: None)
    assert journal.sent() == 2
    assert books.settled == []
    assert journal.finished()
