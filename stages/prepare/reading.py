"""Reads pieces of a source as rows: text files, JSON lines, Parquet, `datasets`, and Python's documentation.

Promise: every row comes with its number in the file, and a row that cannot be read comes as a problem in its place.
Does not: judge what a row holds (that is `documents.py`).

A text file is one document. One longer than `TEXT_DOCUMENT_CHARACTERS` is cut at blank lines into several, so that a
corpus in one file (a book, a dump) still has documents to divide among the splits.

Files are UTF-8, or what their byte order mark says (UTF-16, UTF-32); no other encoding is guessed. They are read in
pieces, so that memory does not grow with the length of a file or of a line: a row of more than `MAX_ROW_BYTES` is a
problem.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from stages.errors import StageFailed
from stages.prepare.decoding import CHUNK, cut_chunks, encoding_hint, encoding_of, text_chunks, undecodable
from stages.prepare.opening import open_dataset
from stages.prepare.parts import Piece
from stages.storage import cache_root, fetch

PARQUET_BATCH_ROWS = 1024
MAX_ROW_BYTES = 32 * 1024 * 1024
"""Of one line or element of JSON: some 8 million tokens, and as Python objects a few times as much memory."""
_SPACE = re.compile(r"\s*")


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
    encoding = encoding_of(path)
    if problem := undecodable(path, encoding):
        yield SourceRow(1, None, problem + encoding_hint(path))
        return
    with path.open(encoding=encoding, newline="") as source:
        for number, document in enumerate(cut_chunks(text_chunks(source)), 1):
            yield SourceRow(number, document)


def _read_lines(piece: Piece, path: Path) -> Iterator[SourceRow]:
    """Read the lines that begin in the byte range; of a file that has no such lines all by the first piece.

    That is a `.json` file that holds one list, and one in UTF-16 or UTF-32.
    """
    encoding = encoding_of(path)
    if path.suffix.lower() == ".json" and _begins_list(path, encoding):
        yield from _read_json_list(path, encoding) if piece.start == 0 else ()
        return
    if encoding.startswith(("utf-16", "utf-32")):
        yield from _read_recoded_lines(path, encoding) if piece.start == 0 else ()
        return
    with path.open("rb") as source:
        source.seek(max(piece.start - 1, 0))
        while piece.start and source.tell() < piece.stop and not source.readline(CHUNK).endswith(b"\n"):
            pass
        number = 0
        while source.tell() < piece.stop:
            line, num_bytes = _read_line(source)
            number += 1
            if num_bytes > MAX_ROW_BYTES:
                yield SourceRow(number, None, f"{_too_long('a line', num_bytes)}")
            elif line.strip():
                yield _json_row(number, line)


def _too_long(what: str, num_bytes: int) -> str:
    return f"{what} of {num_bytes} bytes, expected at most {MAX_ROW_BYTES}; divide it into several rows"


def _read_line(source: BinaryIO) -> tuple[bytes, int]:
    """Read a line, and say how long it is; of one that is too long nothing is kept."""
    line = source.readline(MAX_ROW_BYTES + 1)
    num_bytes = len(line)
    while len(line) > CHUNK and not line.endswith(b"\n"):
        line = source.readline(CHUNK + 1)
        num_bytes += len(line)
    return line if num_bytes <= MAX_ROW_BYTES else b"", num_bytes


def _read_recoded_lines(path: Path, encoding: str) -> Iterator[SourceRow]:
    if problem := undecodable(path, encoding):
        yield SourceRow(1, None, problem)
        return
    with path.open(encoding=encoding) as source:
        number = 0
        while line := source.readline(MAX_ROW_BYTES + 1):
            number += 1
            length = len(line)
            while len(line) > CHUNK and not line.endswith("\n"):
                line = source.readline(CHUNK + 1)
                length += len(line)
            if length > MAX_ROW_BYTES:
                yield SourceRow(number, None, _too_long("a line", length))
            elif line.strip():
                yield _json_row(number, line)


def _json_row(number: int, line: bytes | str) -> SourceRow:
    try:
        value = json.loads(line)
    except UnicodeDecodeError as error:
        return SourceRow(number, None, f"not UTF-8 at byte {error.start} of the line; write the file again as UTF-8")
    except (ValueError, RecursionError) as error:
        return SourceRow(number, None, f"not JSON ({error})")
    return _object_row(number, value)


def _object_row(number: int, value: Any) -> SourceRow:
    if not isinstance(value, dict):
        return SourceRow(number, None, f"a JSON {type(value).__name__}, expected an object with fields")
    return SourceRow(number, value)


def _begins_list(path: Path, encoding: str) -> bool:
    with path.open(encoding=encoding, errors="replace") as source:
        return source.read(64).lstrip()[:1] == "["


def _read_json_list(path: Path, encoding: str) -> Iterator[SourceRow]:
    """Read the elements of a list one after another; after one that is damaged none can be found."""
    if problem := undecodable(path, encoding):
        yield SourceRow(1, None, problem + encoding_hint(path))
        return
    decoder, number, is_whole = json.JSONDecoder(), 1, False
    with path.open(encoding=encoding) as source:
        text = source.read(CHUNK)
        position = text.index("[") + 1
        while True:
            try:
                found = _next_element(decoder, text, position, is_first=number == 1)
            except (ValueError, RecursionError) as error:
                is_too_long = len(text) - position > MAX_ROW_BYTES
                if is_whole or is_too_long:
                    problem = _too_long("an element", len(text) - position) if is_too_long else f"not JSON ({error})"
                    yield SourceRow(number, None, problem)
                    return
                more = source.read(max(CHUNK, len(text) - position))
                text, position, is_whole = text[position:] + more, 0, not more
                continue
            if found is None:
                return
            value, position = found
            yield _object_row(number, value)
            number += 1


def _next_element(decoder: json.JSONDecoder, text: str, position: int, *, is_first: bool) -> tuple[Any, int] | None:
    """Return a list's next element and where it ends; None at the list's end."""
    position = _end_of_space(text, position)
    if text[position : position + 1] == "]":
        return None
    if not is_first:
        if text[position : position + 1] != ",":
            raise ValueError(f"expected ',' or ']', found {text[position : position + 1]!r}")
        position = _end_of_space(text, position + 1)
    value, stop = decoder.raw_decode(text, position)
    if stop == len(text):  # a number may go on, and a list ends with a bracket
        raise ValueError("the list is not closed")
    return value, stop


def _end_of_space(text: str, position: int) -> int:
    found = _SPACE.match(text, position)
    assert found is not None, "it matches nothing too"
    return found.end()


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
                for batch in file.iter_batches(_batch_rows(file.metadata.row_group(group)), row_groups=[group]):
                    low, high = max(first - at, 0), min(last - at, batch.num_rows)
                    if low < high:
                        values = batch.slice(low, high - low).to_pylist()
                        numbered = enumerate(values, at + low - first + 1)
                        yield from (SourceRow(number, _without_nulls(value)) for number, value in numbered)
                    at += batch.num_rows
            position += num_rows


def _batch_rows(group: Any) -> int:
    """Return how many rows of a Parquet row group are decoded at a time: long ones take memory."""
    fitting: int = MAX_ROW_BYTES * group.num_rows // max(1, group.total_byte_size)
    return max(1, min(PARQUET_BATCH_ROWS, fitting))


def _without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """Drop nulls inside a row's values: Arrow gives each object the keys of all, as those of other tools' arguments."""
    return {name: _drop_nulls(value) if isinstance(value, list | dict) else value for name, value in row.items()}


def _drop_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _drop_nulls(item) for key, item in value.items() if item is not None}
    return [_drop_nulls(item) for item in value] if isinstance(value, list) else value


def _read_rows(piece: Piece) -> Iterator[SourceRow]:
    assert piece.dataset is not None
    data = open_dataset(piece.dataset).select(range(piece.start, piece.stop))
    return (SourceRow(number, _without_nulls(value)) for number, value in enumerate(data, 1))


def first_row_number(piece: Piece) -> int:
    """Return the number in its file of the row before the piece's first, for messages only (it may read the file)."""
    if piece.kind == "rows":
        return piece.start
    if piece.kind == "lines" and piece.start:
        with _local_path(piece).open("rb") as source:
            chunks = (source.read(min(CHUNK, piece.start - 1 - at)) for at in range(0, piece.start - 1, CHUNK))
            return sum(chunk.count(b"\n") for chunk in chunks) + 1
    if piece.kind == "parquet" and piece.start:
        import pyarrow.parquet as pq

        total: int = pq.read_metadata(_local_path(piece)).num_rows
        return total * piece.start // piece.stop
    return 0
