"""The `prepare` stage: documents, chats and labelled rows → a dataset of packed tokens, with Ray Data."""

import pickle
import tempfile
from collections.abc import Iterator, Mapping
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from stages.contract import Config, Context, ExternalData, Input, Kind, Outcome, Shards, Split, Stage
from stages.errors import ConfigError, StageFailed
from stages.external.checkpoints import PretrainedTokenizer
from stages.external.documents import DocumentSource, Files, HubDataset
from stages.formats.dataset import DatasetInfo
from stages.runtime.processes import quiet_data
from stages.runtime.workarounds import deprecated_options
from stages.runtime.workers import WorkerSetup, translated_errors, worker_options

if TYPE_CHECKING:
    from stages.formats.dataset import Duplicates
    from stages.prepare.division import Division
    from stages.prepare.packing import Cutting
    from stages.prepare.summary import Summary


Overlong = Literal["reject", "truncate"]
"""What becomes of a chat or labelled row that is longer than a row of tokens."""


class ByteLevelBPE(Config):
    """A byte-level BPE tokenizer, trained on the training split."""

    vocabulary_size: int = Field(ge=257)
    """Tokens: 256 bytes, the end of text, and merges."""
    training_characters: int = Field(64_000_000, gt=0)
    """Characters to train on at most, an equal share of each part: more of them hardly change a vocabulary of usual
    size, and cost 0.4 s of CPU a million (measured 2026-11-21, vocabulary of 4096)."""


class Prepare(Stage):
    """Turns documents into a dataset of packed tokens, split before it is packed."""

    KIND: ClassVar[Kind] = "dataset"
    REVISION: ClassVar[str] = "2026-11-25 near duplicates by what is learned; large clusters of them stay divided"
    PLACES_WORKERS: ClassVar = True
    INPUTS: ClassVar[Mapping[str, Input]] = {"tokenizer": Input(("model", "dataset"), required=False)}

    source: DocumentSource
    """Where documents come from."""
    tokenizer: ByteLevelBPE | PretrainedTokenizer | None = None
    """Train one, or take one from outside; None where the input `tokenizer` is given."""
    sequence_length: int = Field(ge=8)
    """Tokens in one packed row; longer ones cost memory in all that follows."""
    overlong: Overlong = "reject"
    """What becomes of a chat or labelled row that is longer than a row of tokens: left out, or cut at its end, so that
    the last answer is not learned to its end. Either is counted."""
    context_fraction: float = Field(0.5, ge=0, le=0.9)
    """A text longer than a row is cut into windows; of each but the first this share repeats the end of the one before,
    as context that is no target, so that each token is predicted once and has at least so much of a row before it.
    0.5 makes rows of long texts cost twice as much for each target as 0 does."""
    train_context_fraction: float | None = Field(None, ge=0, le=0.9)
    """The same for the training split, where targets count more than comparable figures; None is `context_fraction`."""
    validation_fraction: float = Field(0.05, ge=0, le=1)
    """Fraction of documents on which models are compared. 5 % suits up to some 10^5 documents; take less of more. With
    1 the whole source is for comparison."""
    calibration_fraction: float = Field(0.05, ge=0, le=1)
    """Fraction of documents that pruning and quantization look at; never trained or evaluated on."""
    row_schema: Literal["auto", "text", "chat", "prompt-completion"] = "auto"
    """What rows hold (`stages/prepare/documents.py`); `auto` finds it by the fields of the first row."""
    text_field: str = "text"
    """The field of a `text` row that holds the text."""
    max_rejected_fraction: float = Field(0.01, ge=0, le=1)
    """Fraction of rows that may be other than their schema expects; more fail the step."""
    max_documents: int | None = Field(None, ge=1)
    """Take only the first documents, in the order of file names; None takes all."""
    duplicate_similarity: float | None = Field(0.8, gt=0, le=1)
    """Documents of which what is learned is at least this similar (Jaccard, of runs of five words) are kept on one side
    of the split; None divides all by their own content. Comparing them reads the source once more."""
    part_bytes: int = Field(8 * 1024 * 1024, ge=1024)
    """Bytes of source that one task reads: about 2 million tokens, seconds of work. Rows do not span parts, so it
    counts in identity."""
    shard_tokens: int = Field(65_536, ge=8)
    """Tokens of one shard, and so of a shard of signals: what is taught between two receipts, and so what a crash
    costs. Its signals with k = 64 take 26 MB of memory. More suits corpora of many billion tokens."""
    seed: int = 0
    """Of the split."""

    @model_validator(mode="after")
    def _check_fractions(self) -> Self:
        held_out = self.validation_fraction + self.calibration_fraction
        if held_out > 1:
            raise ValueError(f"validation_fraction + calibration_fraction are {held_out:g}, expected at most 1")
        if held_out == 1 and isinstance(self.tokenizer, ByteLevelBPE):
            raise ValueError(
                "validation_fraction + calibration_fraction leave no text to train the tokenizer on; expected less "
                "than 1"
            )
        return self

    def check(self, sources: Mapping[str, Stage | ExternalData | Mapping[str, Stage | ExternalData]]) -> None:
        """Check that there is exactly one tokenizer.

        Raises:
            ConfigError: none, or two.
        """
        wired = "tokenizer" in sources
        if wired and self.tokenizer is not None:
            raise ConfigError(
                f"two tokenizers: the input 'tokenizer' and tokenizer={self.tokenizer!r}; leave one of them out"
            )
        if not wired and self.tokenizer is None:
            raise ConfigError(
                "no tokenizer: set tokenizer=ByteLevelBPE(…) or PretrainedTokenizer(…), or give the input 'tokenizer'"
            )

    def run(self, context: Context) -> Outcome:
        """Plan parts, make or copy the tokenizer, prepare the parts that are missing, check the whole.

        Raises:
            StageFailed: too many rejected rows, no usable text, too little of it, or a tokenizer that will not do.
        """
        from stages.models.checkpoints import upload_folder
        from stages.prepare import summary, work
        from stages.prepare.tokenizer import describe_tokenizer

        parts, rows = self._parts(context)
        division, duplicates = self._divide(context, parts, rows)
        with tempfile.TemporaryDirectory(prefix="tokenizer-") as temporary:
            folder = Path(temporary)
            tokenizer = self._make_tokenizer(context, parts, rows | {"division": division}, folder)
            encoder, facts = describe_tokenizer(tokenizer, folder)
            upload_folder(folder, context.out, "tokenizer")
        job = work.PrepareJob(
            **rows,
            division=division,
            cuttings={split: self._cutting(split, encoder.prefix) for split in summary.SPLITS},
            shard_tokens=self.shard_tokens,
            pad_token_id=facts.eos_token_id if facts.pad_token_id is None else facts.pad_token_id,
            encoder=encoder,
            shards=Shards(context.out, context.resume),
        )
        total = summary.Summary.total(_prepare_parts(parts, job, context))
        overlong = summary.describe_overlong(total, self.overlong, self.sequence_length)
        for note in summary.notes(total, overlong, duplicates, division):
            context.reporter.note(note)
        rejects = self.max_rejected_fraction
        summary.check(total, rows["schema"], division, max_rejected_fraction=rejects, duplicates=duplicates)
        DatasetInfo(
            tokenizer_digest=facts.digest,
            vocabulary_size=facts.vocabulary_size,
            sequence_length=self.sequence_length,
            bos_token_id=facts.bos_token_id,
            eos_token_id=facts.eos_token_id,
            pad_token_id=facts.pad_token_id,
            splits=total.splits,
            rejected=total.rejected,
            overlong=overlong,
            unlearned_answers=total.unlearned_answers,
            unused_fields=total.unused_fields,
            duplicates=duplicates,
            sources=(self.source.identity(),),
        ).write(context.out)
        more = duplicates.metrics if duplicates else {}
        return Outcome({**total.metrics, **more, "vocabulary_size": float(facts.vocabulary_size)})

    def _parts(self, context: Context) -> tuple[list[Any], dict[str, Any]]:
        """Return the parts of the source, and how their rows are read."""
        from stages.prepare.documents import detect_schema
        from stages.prepare.encoding import set_tokenizer_threads
        from stages.prepare.parts import plan_parts
        from stages.prepare.work import limit_documents

        set_tokenizer_threads(context.resources.total_cpus)
        if isinstance(self.source, HubDataset):
            context.reporter.started()  # downloading is work, and needs none of the workers' resources
        parts = plan_parts(self.source, self.part_bytes)
        schema = detect_schema(parts, self.text_field) if self.row_schema == "auto" else self.row_schema
        rows: dict[str, Any] = {"schema": schema, "text_field": self.text_field}
        if self.max_documents is not None:
            context.reporter.started()  # counting documents reads them, here, before any worker is asked for
            parts = limit_documents(parts, **rows, max_documents=self.max_documents)
        return parts, rows

    def _divide(self, context: Context, parts: list[Any], rows: dict[str, Any]) -> "tuple[Division, Duplicates | None]":
        """Say what is read, and return the division, near duplicates on one side of it, and how many there are."""
        from stages.prepare import duplicates
        from stages.prepare.division import Division

        for note in self.source.notes() if isinstance(self.source, Files) else ():
            context.reporter.note(note)
        division = Division(self.seed, self.validation_fraction, self.calibration_fraction)
        if self.duplicate_similarity is None:
            return division, None
        folder = context.resume / duplicates.FOLDER
        written = duplicates.signed_parts(folder)
        missing = [part for part in parts if part.index not in written]
        signed = _map_parts(_sign, [(part,) for part in missing], {**rows, "folder": folder}, context)
        for num_done, _ in enumerate(signed, len(parts) - len(missing) + 1):
            context.reporter.progress(num_done, len(parts), "parts compared")
        return duplicates.keep_together(folder, division, self.duplicate_similarity)

    def _cutting(self, split: Split, prefix: tuple[int, ...]) -> "Cutting":
        """Return how the documents of a split become segments."""
        from stages.prepare.packing import Cutting

        context = self.train_context_fraction if split == "train" else None
        return Cutting(
            sequence_length=self.sequence_length,
            prefix=prefix,
            overlong=self.overlong,
            context_fraction=self.context_fraction if context is None else context,
        )

    def _make_tokenizer(self, context: Context, parts: list[Any], rows: dict[str, Any], folder: Path) -> Any:
        """Train or copy the tokenizer into a local folder, and return it loaded."""
        from stages.models.tokenization import copy_tokenizer
        from stages.prepare.tokenizer import train_byte_level_bpe

        given = context.optional("tokenizer")
        if isinstance(self.tokenizer, PretrainedTokenizer):
            given = self.tokenizer.artifact("tokenizer")
        if given is not None:
            return copy_tokenizer(given.folder("model" if given.kind == "model" else "tokenizer"), folder)
        assert isinstance(self.tokenizer, ByteLevelBPE), "check() lets no other through"
        sampled = parts[:: -(-len(parts) // MAX_SAMPLED_PARTS) or 1]
        share = -(-self.tokenizer.training_characters // max(1, len(sampled)))
        results = _map_parts(_sample, [(part,) for part in sampled], {**rows, "max_characters": share}, context)
        texts = [text for _, found in sorted(results, key=itemgetter(0)) for text in found]
        if not texts:
            raise StageFailed(
                "a source with no usable text: no document for training holds any; check source and text_field"
            )
        tokenizer = train_byte_level_bpe(texts, vocabulary_size=self.tokenizer.vocabulary_size)
        tokenizer.save_pretrained(folder)
        return tokenizer


MAX_SAMPLED_PARTS = 256
"""Parts from which a tokenizer's training text is taken, evenly spaced: no need to open ten thousand files for it."""


def _prepare_parts(parts: list[Any], job: Any, context: Context) -> "list[Summary]":
    """Return the summaries of all parts in order: those of earlier attempts, and those of this one."""
    from stages.prepare import summary

    written = frozenset(job.shards.done())
    found = summary.finished(job.shards, written)
    missing = [part for part in parts if part.index not in found]
    made_now = _map_parts(_prepare, [(part, written) for part in missing], {"job": job}, context)
    for num_done, (index, made) in enumerate(made_now, len(parts) - len(missing) + 1):
        context.reporter.progress(num_done, len(parts), "parts")
        found[index] = made
    return [found[part.index] for part in parts]


def _sign(part: Any, **fixed: Any) -> None:
    from stages.prepare.duplicates import sign_part

    sign_part(part, **fixed)


def _sample(part: Any, **fixed: Any) -> Any:
    from stages.prepare.work import sample_texts

    return part.index, sample_texts(part, **fixed)


def _prepare(part: Any, written: frozenset[str], *, job: Any) -> Any:
    from stages.prepare.work import prepare_part

    return part.index, prepare_part(part, job, written)


def _apply(row: dict[str, bytes], *, function: Any, fixed: dict[str, Any], setup: WorkerSetup) -> dict[str, bytes]:
    """Apply a function to an item in a worker."""
    setup.begin(uses_torch=False)
    from stages.prepare.encoding import set_tokenizer_threads

    set_tokenizer_threads(setup.num_threads)
    return {"result": pickle.dumps(function(*pickle.loads(row["item"]), **fixed))}


def _map_parts(function: Any, items: list[tuple[Any, ...]], fixed: dict[str, Any], context: Context) -> Iterator[Any]:
    """Map items with Ray Data, one task an item, and yield the results in the order in which they finish.

    No retries: they are the engine's, and a shard written twice under one name by one attempt would remove
    the receipt's file (`Shards.write`).
    """
    import ray
    from ray.data import DataContext, TaskPoolStrategy

    if not items:
        return
    quiet_data(DataContext.get_current())
    resources = context.resources
    rows = [{"item": pickle.dumps(item)} for item in items]
    with deprecated_options():
        data = ray.data.from_items(rows, override_num_blocks=min(len(rows), MAX_BLOCKS)).map(
            _apply,
            fn_kwargs={"function": function, "fixed": fixed, "setup": WorkerSetup.of(context)},
            compute=TaskPoolStrategy(size=resources.workers),
            max_retries=0,
            **worker_options(resources),
        )
    with translated_errors():
        for row in data.iter_rows():
            yield pickle.loads(row["result"])


MAX_BLOCKS = 10_000
"""Ray Data's blocks: one part each, until there are more parts than this; each block is a task to schedule."""
