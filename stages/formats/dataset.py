"""`dataset.json`: what a dataset of packed tokens is, beside its tokenizer and its token shards (`tokens.py`)."""

from typing import Any, ClassVar, Literal

from pydantic import Field

from stages.contract import Split
from stages.formats.json_format import FormatModel, JsonFormat

__all__ = ["DatasetInfo", "OverlongDocuments", "RejectedRows", "SplitCounts"]


class SplitCounts(FormatModel):
    """How much one split holds."""

    shards: int
    rows: int
    """Packed rows of `sequence_length` tokens."""
    tokens: int
    """Targets: tokens whose prediction is learned or scored."""
    documents: int
    filled: int = 0
    """Tokens that are not padding, of `rows` × `sequence_length`."""


class RejectedRows(FormatModel):
    """Rows of the source that are not what their schema expects."""

    count: int
    rows_read: int
    examples: tuple[str, ...]
    """The first of them: file, row and reason."""


class OverlongDocuments(FormatModel):
    """Chats and labelled rows that are longer than a row of tokens."""

    handling: Literal["reject", "truncate"]
    """Whether they were left out, or lost their end."""
    count: int
    fraction: float
    """Of all chats or labelled rows."""


class DatasetInfo(JsonFormat):
    """`dataset.json`."""

    FILE: ClassVar = "dataset.json"

    tokenizer_digest: str
    vocabulary_size: int
    """Highest token id + 1: how many logits a model needs at least."""
    sequence_length: int
    """Tokens in one packed row."""
    bos_token_id: int | None
    eos_token_id: int
    pad_token_id: int | None
    splits: dict[Split, SplitCounts]
    rejected: RejectedRows
    overlong: OverlongDocuments = OverlongDocuments(handling="reject", count=0, fraction=0.0)
    unlearned_answers: int
    """Answers in chats that are no targets, since the chat template changes them."""
    sources: tuple[dict[str, Any], ...] = Field(min_length=1)
    """The identity of each source of documents."""
