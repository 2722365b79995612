"""What the scored text itself says: its bytes, and how well n-gram models of the training tokens predict it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stages.contract import Artifact, Split
from stages.errors import StageFailed
from stages.evaluate.ngrams import KneserNey, target_ngrams
from stages.evaluate.rows import choose_rows, rows_of_split
from stages.formats.dataset import DatasetInfo
from stages.formats.tokens import TokenRows, num_rows, read_batches, shard_pattern

__all__ = ["TextFacts", "examine_text"]

MAX_TRAINING_TOKENS = 10_000_000
"""Of more training tokens so many are drawn, by rows: their n-grams take about 1 GB."""
ROWS_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class TextFacts:
    """About the scored targets."""

    text_bytes: int
    """Of their text in UTF-8."""
    training_tokens: int
    """What the n-gram models counted; 0 where there is no training split."""
    bigram_nll: float | None = None
    """Nats per target."""
    trigram_nll: float | None = None


def examine_text(data: Artifact, training: Artifact, split: Split, *, max_rows: int | None, seed: int) -> TextFacts:
    """Count the bytes of a split's targets, and score them by n-grams of another dataset's training split.

    A character that a row's end cuts counts as up to three bytes on each side, as it is decoded.

    Args:
        data: the dataset that is scored.
        training: the one that models were trained on, with the same tokenizer; may be the same.
        split: of `data`.
        max_rows: as `rows_of_split`.
        seed: of the draw of rows.

    Raises:
        StageFailed: the tokenizers differ.
    """
    from stages.models.tokenization import load_tokenizer

    scored, learned = DatasetInfo.read(data), DatasetInfo.read(training)
    if scored.tokenizer_digest != learned.tokenizer_digest:
        raise StageFailed(
            "the dataset that is scored and the one of the input `training` have different tokenizers (digests "
            f"{scored.tokenizer_digest[:12]} and {learned.tokenizer_digest[:12]}); prepare both with the same one"
        )
    paths, rows = rows_of_split(data, split, max_rows=max_rows, seed=seed)
    vocabulary = max(scored.vocabulary_size, learned.vocabulary_size)
    tokens, model = _count(training.paths(shard_pattern("train")), learned.sequence_length, vocabulary, seed)
    tokenizer = load_tokenizer(data.folder("tokenizer"))
    num_bytes, num_targets, sums = 0, 0, np.zeros(2)
    for batch in _batches(paths, rows):
        num_bytes += sum(len(text.encode()) for text in tokenizer.batch_decode(_runs(batch), skip_special_tokens=True))
        num_targets += int(batch.mask_RT.sum())
        if model is not None:
            sums += [each.sum() for each in model.log_probs(target_ngrams(batch, vocabulary))]
    if model is None or not num_targets:
        return TextFacts(num_bytes, 0)
    bigram_nll, trigram_nll = (-sums / num_targets).tolist()
    return TextFacts(num_bytes, tokens, bigram_nll, trigram_nll)


def _count(paths: tuple[Path, ...], length: int, vocabulary: int, seed: int) -> tuple[int, KneserNey | None]:
    """Return the training targets that were counted, and the n-gram models of them."""
    rows = choose_rows(num_rows(paths), max_rows=max(1, MAX_TRAINING_TOKENS // length), seed=seed)
    found = [target_ngrams(batch, vocabulary) for batch in _batches(paths, rows)]
    num = sum(map(len, found))
    return num, KneserNey.of(np.concatenate(found), vocabulary) if num else None


def _batches(paths: tuple[Path, ...], rows: NDArray[np.int64]) -> Iterator[TokenRows]:
    return read_batches(paths, rows, rows_per_batch=ROWS_AT_ONCE, columns=("document_ids", "loss_mask"))


def _runs(batch: TokenRows) -> list[list[int]]:
    """Return the targets that stand side by side in a row and a document, run by run: text to be decoded."""
    runs = []
    for ids_T, document_ids_T, mask_T in zip(batch.ids_RT, batch.document_ids_RT, batch.mask_RT, strict=True):
        places = np.flatnonzero(mask_T)
        cuts = np.flatnonzero((np.diff(places) > 1) | (np.diff(document_ids_T[places]) != 0)) + 1
        runs += [ids_T[run].tolist() for run in np.split(places, cuts) if len(run)]
    return runs
