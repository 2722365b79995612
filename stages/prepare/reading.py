"""Reads pieces of a source as rows: text files, JSON lines, Parquet, `datasets`, and Python's documentation.

Promise: every row comes with its number in the file, and a row that cannot be read comes as a problem in its place.
Does not: judge what a row holds (that is `documents.py`).

A text file is one document. One longer than `TEXT_DOCUMENT_CHARACTERS` is cut at blank lines into several, so that a
corpus in one file (a book, a dump) still has documents to divide among the splits.
"""

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.errors import StageFailed
from stages.prepare.opening import open_dataset
from stages.prepare.parts import Piece
from stages.storage import cache_root, fetch

TEXT_DOCUMENT_CHARACTERS = 20_000
"""Some 5000 tokens: several training sequences, and 1 MB of text is still about 50 documents to split."""
PARQUET_BATCH_ROWS = 1024


@dataclass(frozen=True, slots=True)
class SourceRow:
    """A row as it was read: the text of a text file, or a mapping; or what is wrong with it."""

    number: int
    """1-based in its piece."""
    value: Any
    problem: str | None = None


def read_piece(piece: Piece) -> Iterator[SourceRow]:
    """Read a piece's rows in order.

    Raises:
        StageFailed: the file is missing on this node, or is no longer what it was when its digest was taken.
    """
    if piece.kind == "topics":
        from stages.prepare.python_docs import read_topics

        return (SourceRow(number, text) for number, (_, text) in enumerate(read_topics(), 1))
    if piece.kind == "module":
        from stages.prepare.python_docs import read_module

        return iter([SourceRow(1, read_module(piece.name))])
    if piece.kind == "rows":
        return _read_rows(piece)
    reader = {"text": _read_text, "lines": _read_lines, "parquet": _read_parquet}[piece.kind]
    return reader(piece, _local_path(piece))


def _local_path(piece: Piece) -> Path:
    assert piece.file is not None
    path = fetch(piece.file, cache_root() / "sources" / piece.file.sha256[:16])
    if not path.exists():
        raise StageFailed(
            f"the source file {piece.file.uri!r} does not exist on this node; it did where the workflow was planned. "
            "Put it where every node can read it: a shared disk or an object store"
        )
    if path.stat().st_size != piece.file.size_bytes:
        raise StageFailed(f"the source file {piece.file.uri!r} changed while the step ran; run the workflow again")
    return path


def _read_text(piece: Piece, path: Path) -> Iterator[SourceRow]:
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        yield SourceRow(1, None, f"not UTF-8 at byte {error.start}")
        return
    for number, document in enumerate(cut_text(text), 1):
        yield SourceRow(number, document)


def cut_text(text: str, max_characters: int = TEXT_DOCUMENT_CHARACTERS) -> Iterator[str]:
    """Cut a long text at the last blank line before the limit, else at a line's end, else at the limit itself."""
    start = 0
    while len(text) - start > max_characters:
        limit = start + max_characters
        for separator in ("\n\n", "\n"):
            stop = text.rfind(separator, start + 1, limit)
            if stop > start:
                break
        else:
            stop = limit
        yield text[start:stop].strip("\n")
        start = stop
    yield text[start:].strip("\n")


def _read_lines(piece: Piece, path: Path) -> Iterator[SourceRow]:
    """Read the lines that begin in the byte range; a `.json` file that holds one list is read whole by the first."""
    with path.open("rb") as source:
        if path.suffix.lower() == ".json" and source.read(64).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"[":
            yield from _read_json_list(path) if piece.start == 0 else ()
            return
        source.seek(max(piece.start - 1, 0))
        if piece.start:
            source.readline()
        number = 0
        while source.tell() < piece.stop:
            line = source.readline()
            number += 1
            if line.strip():
                yield _json_row(number, line)


def _json_row(number: int, line: bytes) -> SourceRow:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        return SourceRow(number, None, f"not JSON ({error})")
    if not isinstance(value, dict):
        return SourceRow(number, None, f"a JSON {type(value).__name__}, expected an object with fields")
    return SourceRow(number, value)


def _read_json_list(path: Path) -> Iterator[SourceRow]:
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        yield SourceRow(1, None, f"not JSON ({error})")
        return
    for number, value in enumerate(values, 1):
        problem = None if isinstance(value, dict) else f"a JSON {type(value).__name__}, expected an object with fields"
        yield SourceRow(number, None if problem else value, problem)


def _read_parquet(piece: Piece, path: Path) -> Iterator[SourceRow]:
    """Read the rows of one of `stop` equal fractions; only the row groups that overlap it are decoded."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise StageFailed(
            f"the source file {piece.name!r} is not Parquet ({error}); write it again or leave it out"
        ) from error
    with file:
        total = file.metadata.num_rows
        first, last = total * piece.start // piece.stop, total * (piece.start + 1) // piece.stop
        position = 0
        for group in range(file.metadata.num_row_groups):
            num_rows = file.metadata.row_group(group).num_rows
            if position < last and position + num_rows > first:
                at = position
                for batch in file.iter_batches(PARQUET_BATCH_ROWS, row_groups=[group]):
                    low, high = max(first - at, 0), min(last - at, batch.num_rows)
                    if low < high:
                        values = batch.slice(low, high - low).to_pylist()
                        yield from (SourceRow(at + low + i - first + 1, value) for i, value in enumerate(values))
                    at += batch.num_rows
            position += num_rows


def _read_rows(piece: Piece) -> Iterator[SourceRow]:
    assert piece.dataset is not None
    data = open_dataset(piece.dataset).select(range(piece.start, piece.stop))
    return (SourceRow(number, value) for number, value in enumerate(data, 1))


def first_row_number(piece: Piece) -> int:
    """Return the number in its file of the row before the piece's first, for messages only (it may read the file)."""
    if piece.kind == "rows":
        return piece.start
    if piece.kind == "lines" and piece.start:
        with _local_path(piece).open("rb") as source:
            return source.read(piece.start - 1).count(b"\n") + 1
    if piece.kind == "parquet" and piece.start:
        import pyarrow.parquet as pq

        total: int = pq.read_metadata(_local_path(piece)).num_rows
        return total * piece.start // piece.stop
    return 0
