"""`dataset.json`: what a dataset of packed tokens is, beside its tokenizer and its token shards (`tokens.py`)."""

from typing import Any, ClassVar, Literal

from pydantic import Field

from stages.contract import Split
from stages.formats.json_format import FormatModel, JsonFormat

__all__ = ["DatasetInfo", "Duplicates", "OverlongDocuments", "RejectedRows", "SplitCounts"]


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


class Duplicates(FormatModel):
    """Documents that are copies of others, whole or nearly; but for `divided`, none is on another side than these."""

    similarity: float
    """Jaccard similarity of runs of words from which on two documents are near duplicates."""
    exact: int
    """Documents whose content occurred before, but for white space."""
    near: int
    """Documents of another content that are near duplicates of another."""
    moved: int
    """Documents that would be on another side by their content alone."""
    largest: int = 0
    """Documents of the largest cluster that near duplicates connect."""
    divided: int = 0
    """Documents in clusters that are too large for one side, and so divided by their own content."""

    @property
    def metrics(self) -> dict[str, float]:
        """Final metrics of the step."""
        return {f"{name}_duplicates": float(getattr(self, name)) for name in ("exact", "near", "moved")}


class OverlongDocuments(FormatModel):
    """Chats and labelled rows that are longer than a row of tokens."""

    handling: Literal["reject", "truncate"]
    """Whether they were left out, or lost their end."""
    count: int
    unanswered: int = 0
    """Those that had no target left once they lost their end, and so are left out."""
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
    unused_fields: dict[str, int] = Field(default_factory=dict)
    """Rows by the name of each field that is not read, or that the chat template does not show."""
    duplicates: Duplicates | None = None
    """None where they were not looked for."""
    sources: tuple[dict[str, Any], ...] = Field(min_length=1)
    """The identity of each source of documents."""
