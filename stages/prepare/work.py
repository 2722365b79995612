"""What one task does with one part: read, split, encode, pack, write.

Promise: a part gives the same shards whoever prepares it and whenever; of one that was half done only the missing
shards are written.
Does not: import Ray.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from stages.contract import Shards, Split
from stages.formats.dataset import RejectedRows, SplitCounts
from stages.formats.tokens import shard_name, to_parquet
from stages.prepare.division import Division
from stages.prepare.documents import Document, PartReader, Schema
from stages.prepare.encoding import Encoded, EncoderState, build_encoder
from stages.prepare.packing import pack
from stages.prepare.parts import Part
from stages.prepare.summary import SPLITS, Summary, keep

BATCH_CHARACTERS = 1_000_000
"""Text that is tokenized in one call: long enough to keep its threads busy, and small beside a part."""


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


def sample_texts(part: Part, *, schema: Schema, text_field: str, division: Division, max_characters: int) -> list[str]:
    """Return a part's first training texts, `max_characters` in all: what a tokenizer is trained on."""
    texts: list[str] = []
    left = max_characters
    for _, document in PartReader(part, schema, text_field):
        if left <= 0:
            break
        if division.side(document.digest) == "train":
            texts.append(document.full_text[:left])
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


def prepare_part(part: Part, job: PrepareJob, written: frozenset[str]) -> Summary:
    """Prepare one part, write those of its shards that are not written yet, and return its summary.

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
                reader.unused.update(result.unused)
                encoded[job.division.side(document.digest)].append(result)
    splits: dict[Split, SplitCounts] = {}
    for split, documents in encoded.items():
        rows = pack(documents, sequence_length=job.sequence_length, pad_token_id=job.pad_token_id)
        splits[split] = SplitCounts(
            shards=min(len(rows), 1), rows=len(rows), tokens=int(rows.mask_RT.sum()), documents=len(documents)
        )
        name = shard_name(split, part.index)
        if len(rows) and name not in written:
            job.shards.write(name, to_parquet(rows), splits[split].model_dump())
    summary = Summary(
        splits=splits,
        rejected=RejectedRows(count=reader.num_rejected, rows_read=reader.num_rows, examples=tuple(reader.examples)),
        unlearned_answers=sum(each.num_unlearned for documents in encoded.values() for each in documents),
        unused_fields=build_encoder(job.encoder).unused(reader.unused),
    )
    keep(job.shards, part.index, summary)
    return summary


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
