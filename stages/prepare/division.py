"""How documents are divided among the splits: by their content and a seed, never by their place.

Near duplicates are the one exception to "by its own content alone": `duplicates.py` moves them to one side.
"""

import hashlib
from dataclasses import dataclass
from typing import Self, get_args

import numpy as np
from numpy.typing import NDArray

from stages.contract import Split

SPLITS: tuple[Split, ...] = get_args(Split)


@dataclass(frozen=True, slots=True, eq=False)
class Moves:
    """Documents that are on another side than their own."""

    keys: NDArray[np.uint64]
    """The first 8 bytes of each digest, in order, little-endian."""
    sides: NDArray[np.uint8]
    """Indexes into the splits."""

    def sorted(self) -> Self:
        """Return them in the order of their keys."""
        order = np.argsort(self.keys, kind="stable")
        return type(self)(self.keys[order], self.sides[order])

    def side(self, digest: bytes) -> Split | None:
        """Return where a document was moved to; None where it was not."""
        key = np.uint64(int.from_bytes(digest[:8], "little"))
        at = int(np.searchsorted(self.keys, key))
        if at == len(self.keys) or self.keys[at] != key:
            return None
        return SPLITS[int(self.sides[at])]


@dataclass(frozen=True, slots=True)
class Division:
    """The fraction of the documents that each split is to have."""

    seed: int
    validation_fraction: float
    calibration_fraction: float
    moves: Moves | None = None
    """Near duplicates that are kept together."""

    @property
    def fractions(self) -> dict[Split, float]:
        """The fraction of each split."""
        held_out = self.validation_fraction + self.calibration_fraction
        return {"train": 1 - held_out, "validation": self.validation_fraction, "calibration": self.calibration_fraction}

    def side(self, digest: bytes) -> Split:
        """Return the split of the document with a digest: where it was moved to, or by a hash of seed and content."""
        moved = self.moves.side(digest) if self.moves is not None else None
        if moved is not None:
            return moved
        hashed = hashlib.sha256(self.seed.to_bytes(8, "big", signed=True) + digest).digest()
        where = int.from_bytes(hashed[:8], "big") / 2**64
        if where < self.validation_fraction:
            return "validation"
        return "calibration" if where < self.validation_fraction + self.calibration_fraction else "train"
