"""Cuts encoded documents into segments, and packs segments into rows of equal length.

A segment is what attention stays within: a whole chat or labelled row, a whole text, or a window of a long one. Each
begins with what the tokenizer puts first, which is no target, as is a segment's first token.

Promises: a chat or labelled row is never cut, but at its end where the config says so; every token of a text but its
first is a target exactly once (its first, too, where the tokenizer puts something before it); in every window but the
first, a target has at least `context_fraction` of the window before it. The same documents give the same rows.
Does not: read, tokenize, or write.

Rows are filled by best fit decreasing (Johnson et al. 1974) over the segments of two shards, of which the fuller rows
leave and the others wait for more: 99.7 % of positions are filled with chats of log-normal length, at some 10^7 tokens
a second (`benchmarks/packing.py`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from stages.formats.packing import Segment, best_fit, pack_rows
from stages.formats.tokens import TokenRows
from stages.prepare.encoding import Encoded

__all__ = ["Cutting", "Packer"]


@dataclass(frozen=True, slots=True)
class Cutting:
    """How documents become segments."""

    sequence_length: int
    """Tokens of a row: what a segment has at most."""
    prefix: tuple[int, ...]
    """What the tokenizer puts before a text; every document begins with it."""
    overlong: Literal["reject", "truncate"]
    """What becomes of a chat or labelled row that is longer than a row."""
    context_fraction: float
    """Share of a long text's window, but of the first, that is context: tokens of the window before, no targets."""

    def whole(self, document: Encoded) -> list[Segment]:
        """Return a chat or labelled row as one segment; none where it is too long and rejected, or has no target."""
        length = len(document.ids)
        if length > self.sequence_length and self.overlong == "reject":
            return []
        return _learnable([self._segment(document, slice(0, min(length, self.sequence_length)))])

    def windows(self, document: Encoded) -> list[Segment]:
        """Return a text as one segment, or as windows where it is longer than a row."""
        begin = len(self.prefix)
        room = self.sequence_length - begin
        # With nothing before a text a window's first token can be no target, so that it must have been one before.
        context = max(min(int(np.ceil(room * self.context_fraction)), room - 1), 0 if begin else 1)
        segments, done = [self._segment(document, slice(0, self.sequence_length))], self.sequence_length
        while done < len(document.ids):
            stop = min(done + room - context, len(document.ids))
            ids = np.concatenate([document.ids[:begin], document.ids[done - context : stop]])
            mask = np.zeros(len(ids), np.bool_)
            mask[begin + context :] = document.mask[done:stop]
            segments.append(Segment(ids, mask, document.document_id))
            done = stop
        return _learnable(segments)

    def _segment(self, document: Encoded, tokens: slice) -> Segment:
        mask = document.mask[tokens].copy()
        mask[:1] = False
        return Segment(document.ids[tokens], mask, document.document_id)


def _learnable(segments: list[Segment]) -> list[Segment]:
    return [segment for segment in segments if segment.mask.any()]


class Packer:
    """Packs the segments of one split, and gives rows as soon as a shard of full ones can be made."""

    def __init__(self, *, sequence_length: int, shard_tokens: int, pad_token_id: int) -> None:
        self._length, self._pad = sequence_length, pad_token_id
        self._shard_rows = max(1, shard_tokens // sequence_length)
        self._waiting: list[Segment] = []
        self._num_waiting = 0

    def add(self, segments: Sequence[Segment]) -> Iterator[TokenRows]:
        """Take segments, and yield the shards that are full."""
        for segment in segments:
            self._waiting.append(segment)
            self._num_waiting += len(segment.ids)
            if self._num_waiting >= 2 * self._shard_rows * self._length:
                rows = best_fit([len(segment.ids) for segment in self._waiting], self._length)
                rows.sort(key=self._filled, reverse=True)  # stable
                yield self._rows(rows[: self._shard_rows])
                left = sorted(index for row in rows[self._shard_rows :] for index in row)
                self._waiting = [self._waiting[index] for index in left]
                self._num_waiting = sum(len(segment.ids) for segment in self._waiting)

    def finish(self) -> Iterator[TokenRows]:
        """Yield what is left, in shards of about equal size."""
        rows = best_fit([len(segment.ids) for segment in self._waiting], self._length)
        num_shards = max(1, round(len(rows) / self._shard_rows))
        bounds = [len(rows) * i // num_shards for i in range(num_shards + 1)]
        for start, stop in pairwise(bounds):
            if start < stop:
                yield self._rows(rows[start:stop])
        self._waiting, self._num_waiting = [], 0

    def _filled(self, row: list[int]) -> int:
        return sum(len(self._waiting[index].ids) for index in row)

    def _rows(self, rows: list[list[int]]) -> TokenRows:
        segments = [[self._waiting[index] for index in row] for row in rows]
        return pack_rows(segments, length=self._length, pad_token_id=self._pad)
