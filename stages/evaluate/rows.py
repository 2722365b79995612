"""Which packed rows of a dataset's split are scored: the same ones in the same order for every model."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stages.contract import Artifact, Split
from stages.errors import StageFailed
from stages.formats.tokens import num_rows, shard_pattern

__all__ = ["choose_rows", "rows_of_split"]


def rows_of_split(
    data: Artifact, split: Split, *, max_rows: int | None, seed: int
) -> tuple[tuple[Path, ...], NDArray[np.int64]]:
    """Return the shards of a dataset's split, and which of their rows are scored.

    Raises:
        StageFailed: the dataset has no such split.
    """
    paths = data.paths(shard_pattern(split))
    if not paths:
        raise StageFailed(f"the dataset has no split {split!r}; expected files {shard_pattern(split)}")
    return paths, choose_rows(num_rows(paths), max_rows=max_rows, seed=seed)


def choose_rows(num_rows: int, *, max_rows: int | None, seed: int) -> NDArray[np.int64]:
    """Return the indices of the rows to read, ascending: all, or `max_rows` drawn without replacement."""
    if max_rows is None or max_rows >= num_rows:
        return np.arange(num_rows)
    return np.sort(np.random.default_rng(seed).choice(num_rows, size=max_rows, replace=False))
