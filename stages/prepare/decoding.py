"""Text files in chunks: their encoding, where they are damaged, and where a long text is cut into documents.

Promise: memory does not grow with the length of a file or of its lines. A file is UTF-8, or what its byte order mark
says (UTF-16, UTF-32); no other encoding is guessed, since a wrong guess gives text that looks almost right.
"""

import codecs
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

TEXT_DOCUMENT_CHARACTERS = 20_000
"""Some 5000 tokens: several training sequences, and 1 MB of text is still about 50 documents to split."""
CHUNK = 1024 * 1024
"""Bytes or characters that are read in one go."""
ENCODINGS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
"""Byte order mark → encoding."""


def encoding_of(path: Path) -> str:
    """Return the encoding that a file's byte order mark names, else UTF-8."""
    with path.open("rb") as source:
        head = source.read(4)
    return next((encoding for mark, encoding in ENCODINGS if head.startswith(mark)), "utf-8")


def undecodable(path: Path, encoding: str) -> str | None:
    """Say where a file is not in an encoding; None where it is."""
    decoder = codecs.getincrementaldecoder(encoding)()
    position, line = 0, 1
    with path.open("rb") as source:
        while True:
            chunk = source.read(CHUNK)
            pending = len(decoder.getstate()[0])
            try:
                line += decoder.decode(chunk, final=not chunk).count("\n")
            except UnicodeDecodeError as error:
                start = position - pending + error.start
                line += error.object[: error.start].count(b"\n")
                return f"not {encoding.removesuffix('-sig').upper()} at byte {start} (line {line})"
            if not chunk:
                return None
            position += len(chunk)


def encoding_hint(path: Path) -> str:
    """Return what may be done about a file that is in no encoding that is known."""
    with path.open("rb") as source:
        head = source.read(CHUNK)
    likely = "utf-16 without a byte order mark" if head.count(0) > len(head) // 5 else "latin-1 or windows-1252"
    return f"; it may be {likely}: write it again as UTF-8, e.g. with iconv"


def text_chunks(source: TextIO) -> Iterator[str]:
    """Yield a text in chunks, with Unix line ends."""
    while chunk := source.read(CHUNK):
        if chunk.endswith("\r"):
            chunk += source.read(1)
        yield chunk.replace("\r\n", "\n")


def cut_text(text: str, max_characters: int = TEXT_DOCUMENT_CHARACTERS) -> Iterator[str]:
    """Cut a long text at the last blank line before the limit, else at a line's end, else at the limit itself."""
    return cut_chunks(iter([text]), max_characters)


def cut_chunks(chunks: Iterator[str], max_characters: int = TEXT_DOCUMENT_CHARACTERS) -> Iterator[str]:
    """Cut a text that comes in chunks as `cut_text` does, with no more than a chunk and a document in memory."""
    text = ""
    for chunk in chunks:
        text, start = text + chunk, 0
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
        text = text[start:]
    yield text.strip("\n")
