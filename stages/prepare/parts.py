"""Parts: the unit of preparing, planned from names and sizes alone, so that every machine plans the same.

Promise: the parts depend on the source's identity and on `part_bytes` only: not on where the files lie (a corpus on S3
and its local copy give the same parts), on the number of workers, or on what the rows hold.
Does not: open a file. A large Parquet file is divided by fractions of its rows, which the reader works out.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from stages.external.documents import (
    LINE_SUFFIXES,
    PARQUET_SUFFIXES,
    DocumentSource,
    Files,
    HubDataset,
    LocalDataset,
    PythonDocs,
)
from stages.prepare.opening import open_dataset
from stages.storage import File

PieceKind = Literal["text", "lines", "parquet", "rows", "topics", "module"]

PYTHON_DOCS_PART_BYTES = 2 * 1024 * 1024
"""Bytes of Python source in one part at most: parsing takes 0.3 s of CPU a megabyte (measured 2026-11-21),
so several parts let several workers share what would be one part by any usual `part_bytes`."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What is read in one go: a whole file, a byte range of lines, a fraction of a Parquet file, a range of rows."""

    kind: PieceKind
    name: str
    """What people see: the file's relative name, the dataset's id."""
    size_bytes: int
    """Bytes of source, by which pieces are grouped."""
    file: File | None = None
    dataset: HubDataset | LocalDataset | None = None
    start: int = 0
    """lines: first byte; rows: first row; parquet: which of `stop` equal fractions."""
    stop: int = 0
    """lines: byte after the last; rows: row after the last; parquet: number of fractions."""


@dataclass(frozen=True, slots=True)
class Part:
    """Pieces that one task prepares into one shard a split."""

    index: int
    pieces: tuple[Piece, ...]
    max_documents: int | None = None
    """Documents to take, in order; None takes all."""

    @property
    def size_bytes(self) -> int:
        """Bytes of source."""
        return sum(piece.size_bytes for piece in self.pieces)


def plan_parts(source: DocumentSource, part_bytes: int) -> list[Part]:
    """Plan the parts of a source, in an order that depends on its identity only.

    Args:
        source: where documents come from; a `HubDataset` is downloaded here.
        part_bytes: bytes of source in one part; a single larger text file is still one part.

    Raises:
        ExternalDataError: the source is missing or out of reach.
    """
    if isinstance(source, Files):
        return _group(_file_pieces(source.files(), part_bytes), part_bytes)
    if isinstance(source, PythonDocs):
        from stages.prepare.python_docs import list_modules

        pieces = [Piece("topics", "pydoc_data/topics", 0)]
        pieces += [Piece("module", name, size) for name, size in list_modules()]
        return _group(pieces, min(part_bytes, PYTHON_DOCS_PART_BYTES))
    return _group(_dataset_pieces(source, part_bytes), part_bytes)


def _file_pieces(files: Iterable[File], part_bytes: int) -> Iterator[Piece]:
    for file in files:
        num = max(1, math.ceil(file.size_bytes / part_bytes))
        whole = Piece("text", file.name, file.size_bytes, file)
        if file.name.lower().endswith(PARQUET_SUFFIXES):
            share = file.size_bytes // num
            yield from (replace(whole, kind="parquet", start=i, stop=num, size_bytes=share) for i in range(num))
        elif file.name.lower().endswith(LINE_SUFFIXES):
            bounds = [file.size_bytes * i // num for i in range(num + 1)]
            for start, stop in pairwise(bounds):
                yield replace(whole, kind="lines", start=start, stop=stop, size_bytes=stop - start)
        else:
            yield whole


def _dataset_pieces(source: HubDataset | LocalDataset, part_bytes: int) -> Iterator[Piece]:
    pinned = source.resolved() if isinstance(source, HubDataset) else source
    data = open_dataset(pinned)
    name = pinned.id if isinstance(pinned, HubDataset) else pinned.folder().name
    num = max(1, math.ceil(data.data.nbytes / part_bytes))
    for i in range(num):
        start, stop = len(data) * i // num, len(data) * (i + 1) // num
        yield Piece("rows", name, data.data.nbytes // num, dataset=pinned, start=start, stop=stop)


def _group(pieces: Iterable[Piece], part_bytes: int) -> list[Part]:
    """Group pieces one after another until the next would exceed `part_bytes`."""
    groups: list[list[Piece]] = []
    filled = 0
    for piece in pieces:
        if not groups or filled + piece.size_bytes > part_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(piece)
        filled += piece.size_bytes
    return [Part(index, tuple(group)) for index, group in enumerate(groups)]
