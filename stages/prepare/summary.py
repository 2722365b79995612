"""What preparing found: of one part, kept below `resume/` once its shards are written, and of all parts together.

Promise: a part counts as finished only when its summary can be read and each of its shards has a receipt.
"""

import math
from collections.abc import Sequence
from typing import get_args

from pydantic import ValidationError

from stages.contract import Shards, Split
from stages.errors import StageFailed
from stages.formats.dataset import RejectedRows, SplitCounts
from stages.formats.json_format import FormatModel
from stages.formats.tokens import shard_name
from stages.prepare.division import Division
from stages.prepare.documents import NUM_EXAMPLES, Schema

SPLITS: tuple[Split, ...] = get_args(Split)
FOLDER = "parts"
"""Below `resume/`."""
MIN_VALIDATION_DOCUMENTS = 2
"""Models are compared by intervals over documents, and one has none."""


class Summary(FormatModel):
    """What one part, or the whole source, gave."""

    splits: dict[Split, SplitCounts]
    rejected: RejectedRows
    overlong: int = 0
    """Chats and labelled rows that are longer than a row of tokens."""
    unlearned_answers: int
    """Answers in chats that are no targets."""

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
            unlearned_answers=sum(part.unlearned_answers for part in parts),
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


def check(summary: Summary, *, schema: Schema, division: Division, max_rejected_fraction: float) -> None:
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
        raise StageFailed(
            f"too little text: {num_documents} documents with {sum(of.tokens for of in splits.values())} tokens were "
            f"found, and too few fall into {' and '.join(empty)}; about {needed} documents are needed for "
            f"validation_fraction={division.validation_fraction} and "
            f"calibration_fraction={division.calibration_fraction}; give more documents, or raise the fractions"
        )
