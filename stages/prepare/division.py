"""How documents are divided among the splits: by their content and a seed alone, never by their place or the others."""

import hashlib
from dataclasses import dataclass

from stages.contract import Split


@dataclass(frozen=True, slots=True)
class Division:
    """The fraction of the documents that each split is to have."""

    seed: int
    validation_fraction: float
    calibration_fraction: float

    @property
    def fractions(self) -> dict[Split, float]:
        """The fraction of each split."""
        held_out = self.validation_fraction + self.calibration_fraction
        return {"train": 1 - held_out, "validation": self.validation_fraction, "calibration": self.calibration_fraction}

    def side(self, digest: bytes) -> Split:
        """Return the split of the document with a digest, by a hash of seed and content."""
        hashed = hashlib.sha256(self.seed.to_bytes(8, "big", signed=True) + digest).digest()
        where = int.from_bytes(hashed[:8], "big") / 2**64
        if where < self.validation_fraction:
            return "validation"
        return "calibration" if where < self.validation_fraction + self.calibration_fraction else "train"
