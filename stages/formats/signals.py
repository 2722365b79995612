"""`signals.json`: what a teacher's stored signals are, beside their shards (`signal_shards.py`)."""

from typing import ClassVar

from stages.contract import Split
from stages.formats.json_format import JsonFormat

__all__ = ["SignalsInfo"]


class SignalsInfo(JsonFormat):
    """`signals.json`."""

    FILE: ClassVar = "signals.json"

    method: str
    """How the teacher's distribution was reduced, e.g. `topk`."""
    k: int
    """Entries kept for each token."""
    temperatures: tuple[float, ...]
    """Temperatures whose log-partition is stored."""
    vocabulary_size: int
    teacher_fingerprint: str
    dataset_fingerprint: str
    tokenizer_digest: str
    sequence_length: int
    split: Split
    dtype: str
    """What the teacher computed in."""
    rows: int
    tokens: int
    bytes_per_token: float
