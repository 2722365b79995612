"""Segments of tokens to packed rows, and back.

Promise: what `pack_rows` makes of segments, `segments_of` gives again, in the order of rows and of places in them; the
same segments give the same rows.

Rows are filled by best fit decreasing (Johnson et al. 1974).
"""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stages.formats.tokens import TokenRows

__all__ = ["Segment", "best_fit", "pack_rows", "segments_of"]


@dataclass(frozen=True, slots=True)
class Segment:
    """Some tokens of one document; attention stays within them."""

    ids: NDArray[np.int32]
    mask: NDArray[np.bool_]
    """True at targets."""
    document_id: int


def pack_rows(rows: Sequence[Sequence[Segment]], *, length: int, pad_token_id: int) -> TokenRows:
    """Return rows that hold the given segments one after another, padded to a length in tokens."""
    shape = (len(rows), length)
    ids, owners = np.full(shape, pad_token_id, np.int32), np.full(shape, -1, np.int64)
    mask, positions = np.zeros(shape, np.bool_), np.zeros(shape, np.int32)
    for number, row in enumerate(rows):
        at = 0
        for segment in row:
            stop = at + len(segment.ids)
            ids[number, at:stop], owners[number, at:stop] = segment.ids, segment.document_id
            mask[number, at:stop], positions[number, at:stop] = segment.mask, np.arange(stop - at)
            at = stop
        positions[number, at:] = np.arange(length - at)
    return TokenRows(ids, owners, mask, positions)


def segments_of(rows: TokenRows) -> Iterator[Segment]:
    """Yield the segments of packed rows, padding left out; a segment begins where the position is 0."""
    ids, owners, mask = rows.ids_RT.ravel(), rows.document_ids_RT.ravel(), rows.mask_RT.ravel()
    starts = np.flatnonzero(rows.positions_RT.ravel() == 0)
    starts = starts[owners[starts] >= 0]
    ends = np.flatnonzero(np.append(rows.positions_RT.ravel()[1:] == 0, True)) + 1
    for start, stop in zip(starts, ends[np.searchsorted(ends, starts, side="right")], strict=True):
        yield Segment(ids[start:stop], mask[start:stop], int(owners[start]))


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put items into bins, the longest first, each where it leaves the least room; return each bin's items.

    Args:
        lengths: of the items, each at most `capacity`.
        capacity: of a bin.
    """
    bins: list[list[int]] = []
    open_bins: list[tuple[int, int]] = []
    """(room, bin), ascending."""
    for item in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        place = bisect_left(open_bins, (lengths[item], -1))
        if place == len(open_bins):
            room, number = capacity, len(bins)
            bins.append([])
        else:
            room, number = open_bins.pop(place)
        bins[number].append(item)
        if room > lengths[item]:
            insort(open_bins, (room - lengths[item], number))
    return bins
