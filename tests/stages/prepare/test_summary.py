"""Summaries of parts: which count as finished, and what they are together."""

from pathlib import Path
from typing import Any

import pytest

from stages.contract import Shards
from stages.errors import StageFailed
from stages.formats.dataset import Duplicates, OverlongDocuments, RejectedRows, SplitCounts
from stages.formats.tokens import shard_name
from stages.prepare import summary
from stages.prepare.division import Division
from stages.prepare.summary import SPLITS, Summary
from tests.fakes import fake_context


def summary_of(rows: int, *examples: str) -> Summary:
    none = SplitCounts(shards=0, rows=0, tokens=0, documents=0)
    train = SplitCounts(shards=1, rows=rows, tokens=10 * rows, documents=2)
    return Summary(
        splits={"train": train, "validation": none, "calibration": none},
        rejected=RejectedRows(count=len(examples), rows_read=5, examples=examples),
        unlearned_answers=1,
        unused_fields={"id": 5, "url": rows},
    )


UNDIVIDED = Division(0, 0.0, 0.0)
NOTHING_OVERLONG = OverlongDocuments(handling="reject", count=0, fraction=0.0)


def shards_of(folder: Path) -> Shards:
    context = fake_context(folder)
    return Shards(context.out, context.resume)


def test_part_is_finished_when_each_shard_has_its_receipt(tmp_path: Path) -> None:
    shards = shards_of(tmp_path)
    for index in (0, 1):
        summary.keep(shards, index, summary_of(3))
    assert summary.finished(shards, frozenset({shard_name("train", 1)})) == {1: summary_of(3)}


def test_part_whose_summary_is_of_another_version_is_not_finished(tmp_path: Path) -> None:
    shards = shards_of(tmp_path)
    (shards.resume / summary.FOLDER).put_json("00000.json", {"index": 0, "splits": {"train": {"rows": 3}}})
    assert summary.finished(shards, frozenset(shard_name(split, 0) for split in SPLITS)) == {}


def test_total_sums_parts_and_keeps_the_first_examples() -> None:
    total = Summary.total([summary_of(3, "a"), summary_of(4, *map(str, range(20)))])
    assert total.splits["train"] == SplitCounts(shards=2, rows=7, tokens=70, documents=4)
    assert (total.rejected.count, total.rejected.rows_read, total.rejected.examples[:2]) == (21, 10, ("a", "0"))
    assert len(total.rejected.examples) == 10
    assert total.metrics["train_rows"] == 7
    assert total.metrics["unlearned_answers"] == 2


def test_fields_that_are_not_used_are_told_in_one_line_with_their_counts() -> None:
    total = Summary.total([summary_of(3), summary_of(4)])
    assert total.unused_fields == {"id": 10, "url": 7}
    overlong, copies = (
        OverlongDocuments(handling="reject", count=0, fraction=0.0),
        Duplicates(similarity=0.8, exact=3, near=2, moved=1),
    )
    unlearned, unused, told = summary.notes(total, overlong, copies, UNDIVIDED)
    assert unlearned.startswith("2 answers in chats are no targets")
    assert unused == "fields of rows that are not used: id (10 rows), url (7 rows)"
    assert told.startswith("3 documents are copies of others and 2 nearly so (similarity of at least 0.8); 1 changed")
    nothing = Duplicates(similarity=0.8, exact=0, near=0, moved=0)
    assert list(summary.notes(Summary.total([]), overlong, nothing, UNDIVIDED)) == []


def test_large_clusters_of_near_duplicates_are_told_with_what_to_set() -> None:
    copies = Duplicates(similarity=0.8, exact=0, near=90, moved=0, largest=70, divided=92)
    _, told = summary.notes(Summary.total([]), NOTHING_OVERLONG, copies, UNDIVIDED)
    assert told.startswith("92 documents are in clusters of near duplicates (the largest has 70) that are too large")
    assert "raise duplicate_similarity (it is 0.8; with 1 only equal ones count)" in told


def test_chats_cut_before_their_answer_are_told_apart() -> None:
    overlong = OverlongDocuments(handling="truncate", count=10, unanswered=4, fraction=0.25)
    (told,) = summary.notes(Summary.total([]), overlong, None, UNDIVIDED)
    assert told.endswith(
        "longer than sequence_length and lost their end; 4 of them had no answer left and are left out"
    )


@pytest.mark.parametrize(("handling", "advised"), [("reject", True), ("truncate", False)])
def test_dataset_of_overlong_chats_alone_is_refused_with_what_helps(handling: Any, advised: bool) -> None:
    total = Summary.total([]).model_copy(update={"overlong": 7, "unanswered": 0 if advised else 7})
    with pytest.raises(StageFailed, match=r"all 7 chats .* raise sequence_length") as caught:
        summary.describe_overlong(total, handling, 64)
    assert ("overlong='truncate'" in str(caught.value)) == advised


@pytest.mark.parametrize(("judged", "calibrating", "told"), [(7, 1, 2), (8, 2, 0), (7, 2, 1)])
def test_splits_too_small_for_what_reads_them_are_told(judged: int, calibrating: int, told: int) -> None:
    counts = {"validation": judged, "calibration": calibrating}
    splits = {split: SplitCounts(shards=1, rows=9, tokens=9, documents=counts.get(split, 50)) for split in SPLITS}
    total = Summary.total([]).model_copy(update={"splits": splits})
    found = list(summary.notes(total, NOTHING_OVERLONG, None, Division(0, 0.05, 0.05)))
    assert len(found) == told
    assert not found or found[0].startswith("7 validation documents: with less than 8 no difference")
    assert told < 2 or found[1].startswith("1 calibration documents: ")
    assert list(summary.notes(total, NOTHING_OVERLONG, None, UNDIVIDED)) == []


def test_split_emptied_by_near_duplicates_names_their_cluster() -> None:
    copies = Duplicates(similarity=0.8, exact=0, near=20, moved=3, largest=12)
    total = summary_of(3)
    with pytest.raises(
        StageFailed, match=r"3 near duplicates were moved .* has 12 documents; with duplicate_similarity=1"
    ):
        summary.check(total, schema="text", division=Division(0, 0.5, 0.1), max_rejected_fraction=1, duplicates=copies)
