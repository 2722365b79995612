"""`search.json`: every quantization scheme that was tried, and the finalists whose checkpoints are kept."""

from typing import Any, ClassVar, Literal

from stages.formats.json_format import FormatModel, JsonFormat

__all__ = ["Finalist", "Search", "Trial"]


class Trial(FormatModel):
    """One scheme: what it measured, or why it failed."""

    scheme: str
    """The scheme's name."""
    config: dict[str, Any]
    """The scheme's fields."""
    status: Literal["done", "failed"]
    error: str | None
    seconds: float
    kl: float | None = None
    """Mean KL(unquantized ‖ quantized), nats per token, over the dataset's vocabulary."""
    kl_p99: float | None = None
    """Its 99th percentile over tokens."""
    agreement: float | None = None
    """Fraction of tokens where both models' most likely token is the same."""
    num_tokens: int | None = None
    """Tokens that were measured."""
    size_bytes: int | None = None
    """Weights on disk."""
    bits_per_weight: float | None = None
    linear_bits_per_weight: float | None = None
    """Of the quantized layers alone."""
    pareto: bool = False
    """Whether no other trial beats it in both size and KL."""
    reload_error: str | None = None
    """Why a finalist did not survive its reload."""


class Finalist(FormatModel):
    """A scheme whose checkpoint is kept."""

    scheme: str
    folder: str
    """The checkpoint's logical folder in the artifact."""
    kl: float
    reloaded_kl: float
    """The KL after plain transformers loaded its files in another process."""
    agreement: float
    size_bytes: int
    bits_per_weight: float
    linear_bits_per_weight: float


class Search(JsonFormat):
    """`search.json`."""

    FILE: ClassVar = "search.json"

    base: str
    """Fingerprint of the model that was quantized."""
    base_bytes: int
    """Its weights on disk."""
    max_kl: float
    """Nats per token that the chosen scheme may have."""
    trials: tuple[Trial, ...]
    finalists: tuple[Finalist, ...]
    chosen: str | None
    """Name of the smallest finalist within `max_kl`, if any."""
