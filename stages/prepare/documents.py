"""Rows to documents: what each schema expects, and what a document's digest is.

| schema | row | targets of the loss |
| --- | --- | --- |
| text | `{"text": "…"}` (the field is configurable), or a text file | every token |
| chat | `{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", …}]}` | what the assistant says |
| prompt-completion | `{"prompt": "…", "completion": "…"}`, or both as lists of messages | the completion |

`chats.py` says what else is read as a chat.

Promise: equal documents (up to white space and Unicode form) have equal digests, and so fall on the same side of the
split (`division.py`); a row's fields that are not read are counted by name.
Does not: find near duplicates (that is `duplicates.py`).
"""

import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from stages.errors import StageFailed
from stages.prepare.chats import CHAT_FIELDS, Chat, RowRejected, read_chat, text_of, unused_fields
from stages.prepare.parts import Part
from stages.prepare.reading import SourceRow, first_row_number, read_piece

Schema = Literal["text", "chat", "prompt-completion"]
NUM_EXAMPLES = 10
"""Rejected rows that are shown."""


@dataclass(frozen=True, slots=True)
class Document:
    """One document of any schema."""

    schema: Schema
    digest: bytes
    """sha256 of the normalized content."""
    text: str = ""
    """text: the document; prompt-completion: the completion."""
    prompt: str = ""
    messages: tuple[dict[str, Any], ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    options: tuple[tuple[str, Any], ...] = ()
    """chat: what the row gives to the chat template."""
    masked: frozenset[int] = frozenset()
    """chat: messages that are no targets though the assistant says them."""
    unused: tuple[str, ...] = ()
    """Fields of its row that are not read."""

    @property
    def id(self) -> int:
        """The first 8 bytes of the digest as a non-negative 63-bit integer."""
        return int.from_bytes(self.digest[:8], "big") & (2**63 - 1)

    @property
    def full_text(self) -> str:
        """All of its text, for training a tokenizer."""
        return "\n".join([*(message["content"] for message in self.messages), self.prompt, self.text]).strip("\n")


def normalize(text: str) -> str:
    """Return the text in NFC with each run of white space as one space: what a digest is taken of."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def _digest(*texts: str) -> bytes:
    normalized = [normalize(text) for text in texts]
    content = normalized[0] if len(normalized) == 1 else json.dumps(normalized, ensure_ascii=False)
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).digest()


def document_of(value: Any, schema: Schema, text_field: str) -> Document | None:
    """Turn a row's value into a document; None where it holds nothing but white space.

    Raises:
        RowRejected: the row is not what the schema expects.
    """
    if isinstance(value, str):
        text = value.strip()
        return Document("text", _digest(text), text) if text else None
    if schema == "text":
        text = text_of(value, text_field)
        unused = tuple(unused_fields(value, {text_field}))
        return Document("text", _digest(text), text, unused=unused) if text.strip() else None
    if schema == "prompt-completion" and not isinstance(value.get("prompt"), list):
        prompt, completion = text_of(value, "prompt"), text_of(value, "completion")
        if not completion.strip():
            raise RowRejected("the completion is empty")
        unused = tuple(unused_fields(value, {"prompt", "completion"}))
        return Document(schema, _digest(prompt, completion), completion, prompt, unused=unused)
    return _chat_document(read_chat(value))


def _chat_document(chat: Chat) -> Document:
    said = [part for message in chat.messages for part in (message["role"], message["content"])]
    calls = [message["tool_calls"] for message in chat.messages if "tool_calls" in message]
    if calls or chat.tools:
        try:
            said.append(json.dumps([calls, chat.tools], sort_keys=True))
        except (TypeError, ValueError, RecursionError) as error:
            raise RowRejected(f"its tools or tool calls cannot be written as JSON ({error})") from error
    return Document(
        "chat",
        _digest(*said),
        messages=chat.messages,
        tools=chat.tools,
        options=chat.options,
        masked=chat.masked,
        unused=chat.unused,
    )


def detect_schema(parts: list[Part], text_field: str) -> Schema:
    """Return the schema by the fields of the first row that can be read; text files alone are text.

    Raises:
        StageFailed: the row has the fields of no schema.
    """
    for piece in (piece for part in parts for piece in part.pieces if piece.kind in ("lines", "parquet", "rows")):
        for row in read_piece(piece):
            if not isinstance(row.value, dict):
                continue
            if any(row.value.get(name) is not None for name in CHAT_FIELDS):
                return "chat"
            if "prompt" in row.value and "completion" in row.value:
                return "prompt-completion"
            if text_field in row.value:
                return "text"
            raise StageFailed(
                f"cannot find the schema of {piece.name}:{row.number}, whose fields are {sorted(row.value)}; expected "
                f"{text_field!r}, or 'messages' or 'conversations', or 'prompt' and 'completion'; set text_field, or "
                "rename the fields"
            )
    return "text"


class PartReader:
    """Reads one part's documents in order, and keeps count of what it rejects."""

    def __init__(self, part: Part, schema: Schema, text_field: str) -> None:
        self._part, self._schema, self._text_field = part, schema, text_field
        self.num_rows = 0
        self.num_rejected = 0
        self.examples: list[str] = []
        self.unused: Counter[str] = Counter()
        """Rows by the name of each field that was not read."""

    def reject(self, place: tuple[int, int], reason: str) -> None:
        """Count a rejected row; the first ten are kept with `file:row`."""
        self.num_rejected += 1
        if len(self.examples) < NUM_EXAMPLES:
            piece = self._part.pieces[place[0]]
            self.examples.append(f"{piece.name}:{first_row_number(piece) + place[1]}: {reason}")

    def __iter__(self) -> Iterator[tuple[tuple[int, int], Document]]:
        """Yield ((piece, row), document)."""
        num_documents = 0
        for index, piece in enumerate(self._part.pieces):
            for row in read_piece(piece):
                if self._part.max_documents is not None and num_documents >= self._part.max_documents:
                    return
                self.num_rows += 1
                document = self._document(index, row)
                if document is not None:
                    num_documents += 1
                    self.unused.update(document.unused)
                    yield (index, row.number), document

    def _document(self, index: int, row: SourceRow) -> Document | None:
        try:
            if row.problem is not None:
                raise RowRejected(row.problem)
            return document_of(row.value, self._schema, self._text_field)
        except RowRejected as error:
            self.reject((index, row.number), str(error))
            return None
