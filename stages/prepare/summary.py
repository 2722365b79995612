"""What preparing found: of one part, kept below `resume/` once its shards are written, and of all parts together.

Promise: a part counts as finished only when its summary can be read and each of its shards has a receipt.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Literal, get_args

from pydantic import Field, ValidationError

from stages.contract import Shards, Split
from stages.errors import StageFailed
from stages.formats.dataset import Duplicates, OverlongDocuments, RejectedRows, SplitCounts
from stages.formats.json_format import FormatModel
from stages.formats.tokens import shard_name
from stages.prepare.division import Division
from stages.prepare.documents import NUM_EXAMPLES, Schema

SPLITS: tuple[Split, ...] = get_args(Split)
FOLDER = "parts"
"""Below `resume/`."""
MIN_VALIDATION_DOCUMENTS = 2
"""Models are compared by intervals over documents, and one has none."""
MIN_CALIBRATION_DOCUMENTS = 2
"""`Quantize` calibrates on some and measures on others."""
VERDICT_DOCUMENTS = 8
"""With D documents a one-sided p-value is at least 2^-D, and times the candidates that it is corrected for it has to be
below 0.025: ⌈log2(4 / 0.025)⌉ for four, as a teacher, a student and both quantized are."""


class Summary(FormatModel):
    """What one part, or the whole source, gave."""

    splits: dict[Split, SplitCounts]
    rejected: RejectedRows
    overlong: int = 0
    """Chats and labelled rows that are longer than a row of tokens."""
    unanswered: int = 0
    """Those of them that are cut at their end and have no target left, so that they are left out."""
    unlearned_answers: int
    """Answers in chats that are no targets."""
    unused_fields: dict[str, int] = Field(default_factory=dict)
    """Rows by the name of each field that is not read, or that the chat template does not show."""

    @classmethod
    def total(cls, parts: Sequence["Summary"]) -> "Summary":
        """Sum the summaries of parts, in the order of their index."""
        examples = tuple(example for part in parts for example in part.rejected.examples)
        return cls(
            splits={split: _sum([part.splits[split] for part in parts]) for split in SPLITS},
            rejected=RejectedRows(
                count=sum(part.rejected.count for part in parts),
                rows_read=sum(part.rejected.rows_read for part in parts),
                examples=examples[:NUM_EXAMPLES],
            ),
            overlong=sum(part.overlong for part in parts),
            unanswered=sum(part.unanswered for part in parts),
            unlearned_answers=sum(part.unlearned_answers for part in parts),
            unused_fields=dict(sum((Counter(part.unused_fields) for part in parts), Counter())),
        )

    @property
    def metrics(self) -> dict[str, float]:
        """Final metrics of the step."""
        counts = {
            f"{split}_{name}": float(getattr(of, name))
            for split, of in self.splits.items()
            for name in ("rows", "tokens", "documents")
        }
        return counts | {
            "rejected_rows": float(self.rejected.count),
            "overlong_documents": float(self.overlong),
            "unlearned_answers": float(self.unlearned_answers),
        }


def describe_overlong(
    total: Summary, handling: Literal["reject", "truncate"], sequence_length: int
) -> OverlongDocuments:
    """Return how many chats or labelled rows are longer than a row of tokens, and what became of them.

    Raises:
        StageFailed: all of them are, and none is left.
    """
    num_kept = sum(of.documents for of in total.splits.values())
    is_cut = handling == "truncate"
    if total.overlong and not num_kept:
        lost = ", and have no answer left once they lose their end" if is_cut else ""
        remedy = "" if is_cut else " (or set overlong='truncate')"
        raise StageFailed(
            f"all {total.overlong} chats or labelled rows are longer than sequence_length={sequence_length} "
            f"tokens{lost}, and a row is never cut at its beginning; raise sequence_length{remedy}"
        )
    num_all = num_kept + (total.unanswered if is_cut else total.overlong)
    return OverlongDocuments(
        handling=handling,
        count=total.overlong,
        unanswered=total.unanswered,
        fraction=total.overlong / max(1, num_all),
    )


def notes(
    summary: Summary, overlong: OverlongDocuments, duplicates: Duplicates | None, division: Division
) -> Iterator[str]:
    """Yield a line each on what is left out, cut, not learned or not used, on copies, and on splits that are small."""
    rejected = summary.rejected
    if rejected.count:
        yield f"{rejected.count} of {rejected.rows_read} rows are left out, such as {rejected.examples[0]}"
    if overlong.count:
        done = "are left out" if overlong.handling == "reject" else "lost their end"
        share = f"{overlong.count} chats or labelled rows, {overlong.fraction:.1%}"
        left = f"; {overlong.unanswered} of them had no answer left and are left out" if overlong.unanswered else ""
        yield f"{share}, are longer than sequence_length and {done}{left}"
    if summary.unlearned_answers:
        yield f"{summary.unlearned_answers} answers in chats are no targets, since the chat template changes them"
    if unused := sorted(summary.unused_fields.items(), key=lambda field: (-field[1], field[0])):
        named = [f"{name} ({count} rows)" for name, count in unused[:NUM_EXAMPLES]]
        more = [f"and {len(unused) - NUM_EXAMPLES} more"] if len(unused) > NUM_EXAMPLES else []
        yield f"fields of rows that are not used: {', '.join([*named, *more])}"
    if duplicates and (duplicates.exact or duplicates.near):
        yield (
            f"{duplicates.exact} documents are copies of others and {duplicates.near} nearly so (similarity of at "
            f"least {duplicates.similarity:g}); {duplicates.moved} changed sides to be where what they copy is"
        )
    if duplicates and duplicates.divided:
        yield (
            f"{duplicates.divided} documents are in clusters of near duplicates (the largest has {duplicates.largest}) "
            "that are too large for one side of the split, and stay divided, so that what models are compared on is "
            "nearly in the training split; if they are rows of one template and no copies, raise duplicate_similarity "
            f"(it is {duplicates.similarity:g}; with 1 only equal ones count), or else remove copies"
        )
    yield from _small_splits(summary, division)


def _small_splits(summary: Summary, division: Division) -> Iterator[str]:
    """Yield a line each on splits that are there and too small for what reads them."""
    num_judged, num_calibrating = (summary.splits[split].documents for split in ("validation", "calibration"))
    if division.validation_fraction and num_judged < VERDICT_DOCUMENTS:
        yield (
            f"{num_judged} validation documents: with less than {VERDICT_DOCUMENTS} no difference between models is "
            "significant on them, so that they reach no verdict; give more documents, or raise validation_fraction"
        )
    if division.calibration_fraction and num_calibrating < MIN_CALIBRATION_DOCUMENTS:
        yield (
            f"{num_calibrating} calibration documents: quantization calibrates on some and measures on others, and "
            f"fails with less than {MIN_CALIBRATION_DOCUMENTS}; give more documents, or raise calibration_fraction"
        )


def _sum(counts: Sequence[SplitCounts]) -> SplitCounts:
    return SplitCounts(**{name: sum(getattr(of, name) for of in counts) for name in SplitCounts.model_fields})


def keep(shards: Shards, index: int, summary: Summary) -> None:
    """Note that a part is finished: to be called after its last shard is written."""
    (shards.resume / FOLDER).put_json(f"{index:05d}.json", summary.model_dump(mode="json"))


def finished(shards: Shards, written: frozenset[str]) -> dict[int, Summary]:
    """Return the summaries of the parts that earlier attempts finished, by index.

    Args:
        shards: where they and their receipts lie.
        written: names of the shards that have a receipt.
    """
    folder = shards.resume / FOLDER
    found: dict[int, Summary] = {}
    for entry in folder.entries():
        index = int(entry.name.removesuffix(".json"))
        try:
            summary = Summary.model_validate(folder.get_json(entry.name))
        except ValidationError:  # of another version: the part is prepared again
            continue
        names = (shard_name(split, index, i) for split, of in summary.splits.items() for i in range(of.shards))
        if all(name in written for name in names):
            found[index] = summary
    return found


def check(
    summary: Summary,
    schema: Schema,
    division: Division,
    *,
    max_rejected_fraction: float,
    duplicates: Duplicates | None = None,
) -> None:
    """Check that the dataset is worth having.

    Raises:
        StageFailed: too many rows were rejected, there is no usable text, or a split is empty.
    """
    rejected, splits = summary.rejected, summary.splits
    if rejected.count > max_rejected_fraction * rejected.rows_read:
        shown = "\n  ".join(rejected.examples)
        raise StageFailed(
            f"{rejected.count} of {rejected.rows_read} rows are not what their schema, {schema!r}, says, more than "
            f"max_rejected_fraction={max_rejected_fraction} allows; the first of them:\n  {shown}\n"
            "Fix the rows, set text_field, give rows of one kind only, or allow more"
        )
    num_documents = sum(of.documents for of in splits.values())
    if not num_documents:
        raise StageFailed(
            f"a source with no usable text: {rejected.rows_read} rows were read, and none holds text; check text_field"
        )
    fewest = {"validation": MIN_VALIDATION_DOCUMENTS}
    empty = [
        split
        for split, fraction in division.fractions.items()
        if fraction and (not splits[split].rows or splits[split].documents < fewest.get(split, 1))
    ]
    if empty:
        smallest = min(division.fractions[split] for split in empty)
        # (1 - fraction)^n ≤ 1 % for n documents that fall on a side independently.
        needed = math.ceil(math.log(0.01) / math.log1p(-smallest)) if smallest < 1 else MIN_VALIDATION_DOCUMENTS
        moved = (
            f"; {duplicates.moved} near duplicates were moved to where what they copy is (the largest cluster has "
            f"{duplicates.largest} documents; with duplicate_similarity=1 only equal ones are)"
            if duplicates and duplicates.moved
            else ""
        )
        raise StageFailed(
            f"too little text: {num_documents} documents with {sum(of.tokens for of in splits.values())} tokens were "
            f"found, and too few fall into {' and '.join(empty)}; about {needed} documents are needed for "
            f"validation_fraction={division.validation_fraction} and "
            f"calibration_fraction={division.calibration_fraction}; give more documents, or raise the fractions{moved}"
        )
