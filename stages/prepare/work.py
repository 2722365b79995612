"""What one task does with one part: read, split, encode, cut, pack, write.

Promise: a part gives the same shards whoever prepares it and whenever; of one that was half done only the missing
shards are written. A shard is written as soon as it is full, so that no more than two of each split are in memory.
Does not: import Ray.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from stages.contract import Shards, Split
from stages.formats.dataset import RejectedRows, SplitCounts
from stages.formats.packing import Segment
from stages.formats.tokens import TokenRows, shard_name, to_parquet
from stages.prepare.division import Division
from stages.prepare.documents import Document, PartReader, Schema
from stages.prepare.encoding import EncoderState, build_encoder
from stages.prepare.packing import Cutting, Packer
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
    cuttings: Mapping[Split, Cutting]
    shard_tokens: int
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
    sinks = {split: _SplitSink(split, part.index, job, written) for split in SPLITS}
    num_unlearned = num_overlong = num_unanswered = 0
    for batch in _batches(reader):
        results = build_encoder(job.encoder).encode([document for _, document in batch])
        for (place, document), result in zip(batch, results, strict=True):
            if isinstance(result, str):
                reader.reject(place, result)
                continue
            reader.unused.update(result.unused)
            side = job.division.side(document.digest)
            cutting, is_text = job.cuttings[side], document.schema == "text"
            segments = cutting.windows(result) if is_text else cutting.whole(result)
            sinks[side].add(segments)
            is_overlong = not is_text and len(result.ids) > cutting.sequence_length
            num_overlong += is_overlong
            num_unanswered += is_overlong and cutting.overlong == "truncate" and not segments
            num_unlearned += result.num_unlearned
    for sink in sinks.values():
        sink.finish()
    summary = Summary(
        splits={split: sink.counts for split, sink in sinks.items()},
        rejected=RejectedRows(count=reader.num_rejected, rows_read=reader.num_rows, examples=tuple(reader.examples)),
        overlong=num_overlong,
        unanswered=num_unanswered,
        unlearned_answers=num_unlearned,
        unused_fields=build_encoder(job.encoder).unused(reader.unused),
    )
    keep(job.shards, part.index, summary)
    return summary


@dataclass(slots=True)
class _SplitSink:
    """Where the segments of one split of a part go: into rows, and these into shards."""

    split: Split
    part: int
    job: PrepareJob
    written: frozenset[str]
    counts: SplitCounts = field(init=False)
    _packer: Packer = field(init=False)

    def __post_init__(self) -> None:
        self.counts = SplitCounts(shards=0, rows=0, tokens=0, documents=0, filled=0)
        length = self.job.cuttings[self.split].sequence_length
        self._packer = Packer(
            sequence_length=length, shard_tokens=self.job.shard_tokens, pad_token_id=self.job.pad_token_id
        )

    def add(self, segments: Sequence[Segment]) -> None:
        """Take the segments of one document, and write the shards that are full."""
        self.counts = self.counts.model_copy(update={"documents": self.counts.documents + bool(segments)})
        self._write(self._packer.add(segments))

    def finish(self) -> None:
        """Write what is left."""
        self._write(self._packer.finish())

    def _write(self, shards: Iterator[TokenRows]) -> None:
        for rows in shards:
            name, before = shard_name(self.split, self.part, self.counts.shards), self.counts
            self.counts = SplitCounts(
                shards=before.shards + 1,
                rows=before.rows + len(rows),
                tokens=before.tokens + int(rows.mask_RT.sum()),
                documents=before.documents,
                filled=before.filled + int((rows.document_ids_RT >= 0).sum()),
            )
            if name not in self.written:
                self.job.shards.write(name, to_parquet(rows), {"rows": len(rows)})


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
