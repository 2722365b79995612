"""What one task does with one part: read, split, encode, pack, write; and what the step makes of all parts together.

Promise: a part gives the same shards whoever prepares it and whenever; a part whose shards have their receipts is not
prepared again, and one that was half done has only its missing shards written.
Does not: know Ray.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from stages.contract import Shards, Split
from stages.errors import StageFailed
from stages.prepare.documents import NUM_EXAMPLES, Document, PartReader, Schema, split_of
from stages.prepare.encoding import Encoded, EncoderState, build_encoder
from stages.prepare.packing import pack, to_parquet
from stages.prepare.parts import Part

SPLITS: tuple[Split, ...] = get_args(Split)
MIN_VALIDATION_DOCUMENTS = 2
"""Models are compared by intervals over documents, and one has none."""
BATCH_CHARACTERS = 1_000_000
"""Text that is tokenized in one call: long enough to keep its threads busy, and small beside a part."""


@dataclass(frozen=True, slots=True)
class Division:
    """How documents are divided among the splits."""

    seed: int
    validation_fraction: float
    calibration_fraction: float

    @property
    def fractions(self) -> dict[Split, float]:
        """The share of the documents that each split is to have."""
        held_out = self.validation_fraction + self.calibration_fraction
        return {"train": 1 - held_out, "validation": self.validation_fraction, "calibration": self.calibration_fraction}

    def side(self, document: Document) -> Split:
        """Return the document's side."""
        return split_of(
            document.digest,
            seed=self.seed,
            validation_fraction=self.validation_fraction,
            calibration_fraction=self.calibration_fraction,
        )


@dataclass(frozen=True, slots=True)
class PrepareJob:
    """What is the same for every part."""

    schema: Schema
    text_field: str
    division: Division
    sequence_length: int
    pad_token_id: int
    encoder: EncoderState
    shards: Shards


def shard_name(split: Split, index: int) -> str:
    """Return the logical name of a part's shard."""
    return f"tokens/{split}-{index:05d}.parquet"


def sample_texts(part: Part, *, schema: Schema, text_field: str, division: Division, max_characters: int) -> list[str]:
    """Return a part's first training texts, `max_characters` in all: what a tokenizer is trained on."""
    texts: list[str] = []
    left = max_characters
    for _, document in PartReader(part, schema, text_field):
        if left <= 0:
            break
        if division.side(document) == "train":
            texts.append(document.words[:left])
            left -= len(texts[-1])
    return texts


def limit_documents(parts: Sequence[Part], *, schema: Schema, text_field: str, max_documents: int) -> list[Part]:
    """Return the parts that hold the first `max_documents` documents, each with how many of them are its own."""
    limited: list[Part] = []
    left = max_documents
    for part in parts:
        if left <= 0:
            break
        quota = replace(part, max_documents=left)
        num_documents = sum(1 for _ in PartReader(quota, schema, text_field))
        limited.append(quota)
        left -= num_documents
    return limited


def prepare_part(part: Part, job: PrepareJob, written: frozenset[str]) -> dict[str, Any]:
    """Prepare one part, write those of its shards that are not written yet, and return its facts.

    Args:
        part: what to read.
        job: how to prepare it.
        written: names of shards that have a receipt already.

    Raises:
        StageFailed: a source file is missing, or changed.
    """
    reader = PartReader(part, job.schema, job.text_field)
    encoded: dict[Split, list[Encoded]] = {split: [] for split in SPLITS}
    for batch in _batches(reader):
        results = build_encoder(job.encoder).encode([document for _, document in batch])
        for (place, document), result in zip(batch, results, strict=True):
            if isinstance(result, str):
                reader.reject(place, result)
            else:
                encoded[job.division.side(document)].append(result)
    unlearned = sum(each.num_unlearned for documents in encoded.values() for each in documents)
    splits: dict[Split, dict[str, int]] = {}
    for split, documents in encoded.items():
        packed = pack(documents, sequence_length=job.sequence_length, pad_token_id=job.pad_token_id)
        rows, tokens = len(packed.input_ids_NT), int(packed.loss_mask_NT.sum())
        splits[split] = {"shards": min(rows, 1), "rows": rows, "tokens": tokens, "documents": len(documents)}
        name = shard_name(split, part.index)
        if rows and name not in written:
            job.shards.write(name, to_parquet(packed), splits[split])
    facts = {
        "index": part.index,
        "rows_read": reader.num_rows,
        "rejected": reader.num_rejected,
        "examples": reader.examples,
        "unlearned_answers": unlearned,
        "splits": splits,
    }
    # Last, so that it says that every shard of the part is written.
    (job.shards.resume / "parts").put_json(f"{part.index:05d}.json", facts)
    return facts


def _batches(reader: PartReader) -> Iterator[list[tuple[tuple[int, int], Document]]]:
    batch: list[tuple[tuple[int, int], Document]] = []
    size = 0
    for item in reader:
        batch.append(item)
        size += len(item[1].text) + len(item[1].prompt) + sum(len(m["content"]) for m in item[1].messages)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def finished_parts(shards: Shards, written: frozenset[str]) -> dict[int, dict[str, Any]]:
    """Return the facts of the parts that earlier attempts finished and whose shards all have their receipts."""
    notes = shards.resume / "parts"
    found = [notes.get_json(entry.name) for entry in notes.entries()]
    return {
        facts["index"]: facts
        for facts in found
        if all(shard_name(split, facts["index"]) in written for split, of in facts["splits"].items() if of["rows"])
    }


def total_facts(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Sum the facts of all parts, in the order of their index."""
    ordered = sorted(parts, key=lambda facts: facts["index"])
    keys = ("shards", "rows", "tokens", "documents")
    return {
        "unlearned_answers": sum(p["unlearned_answers"] for p in ordered),
        "splits": {split: {key: sum(p["splits"][split][key] for p in ordered) for key in keys} for split in SPLITS},
        "rejected": {
            "count": sum(p["rejected"] for p in ordered),
            "rows_read": sum(p["rows_read"] for p in ordered),
            "examples": [example for p in ordered for example in p["examples"]][:NUM_EXAMPLES],
        },
    }


def check_totals(
    totals: Mapping[str, Any], *, schema: Schema, division: Division, max_rejected_fraction: float
) -> None:
    """Check that the dataset is worth having.

    Raises:
        StageFailed: too many rows were rejected, there is no usable text, or a split is empty.
    """
    rejected, splits = totals["rejected"], totals["splits"]
    count, rows_read = rejected["count"], rejected["rows_read"]
    if count > max_rejected_fraction * rows_read:
        shown = "\n  ".join(rejected["examples"])
        raise StageFailed(
            f"{count} of {rows_read} rows are not what their schema, {schema!r}, says, more than max_rejected_fraction="
            f"{max_rejected_fraction} allows; the first of them:\n  {shown}\n"
            "Mend the rows, set text_field, give rows of one kind only, or allow more"
        )
    num_documents = sum(of["documents"] for of in splits.values())
    num_tokens = sum(of["tokens"] for of in splits.values())
    if not num_documents:
        raise StageFailed(
            f"a source with no usable text: {rows_read} rows were read, and none holds text; check text_field"
        )
    fewest = {"validation": MIN_VALIDATION_DOCUMENTS}
    empty = [
        split
        for split, fraction in division.fractions.items()
        if fraction and (not splits[split]["rows"] or splits[split]["documents"] < fewest.get(split, 1))
    ]
    if empty:
        smallest = min(division.fractions[split] for split in empty)
        # (1 - fraction)^n ≤ 1 % for n documents that fall on a side independently.
        needed = math.ceil(math.log(0.01) / math.log1p(-smallest)) if smallest < 1 else MIN_VALIDATION_DOCUMENTS
        raise StageFailed(
            f"too little text: {num_documents} documents with {num_tokens} tokens were found, and too few fall into "
            f"{' and '.join(empty)}; about {needed} documents are needed for "
            f"validation_fraction={division.validation_fraction} and "
            f"calibration_fraction={division.calibration_fraction}; give more documents, or raise the fractions"
        )
