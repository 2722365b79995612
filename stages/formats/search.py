"""`search.json`: every quantization scheme that was tried, and the finalists whose checkpoints are kept."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from stages.formats.json_format import FormatModel, JsonFormat

__all__ = ["DoneTrial", "FailedTrial", "Finalist", "Search", "Trial"]


class DoneTrial(FormatModel):
    """A scheme that was applied and measured."""

    status: Literal["done"] = "done"
    scheme: str
    """The scheme's name."""
    config: dict[str, Any]
    """The scheme's fields."""
    seconds: float
    kl: float
    """Mean KL(unquantized ‖ quantized), nats per token, over the dataset's vocabulary."""
    kl_p99: float
    """Its 99th percentile over tokens."""
    agreement: float
    """Fraction of tokens where both models' most likely token is the same."""
    num_tokens: int
    """Tokens that were measured."""
    size_bytes: int
    """Weights on disk."""
    bits_per_weight: float
    """Bits on disk for each parameter of the model, whatever part it belongs to."""
    linear_bits_per_weight: float
    """Of the linear layers and experts alone, without the output head and routers."""
    kept_layers: tuple[str, ...] = ()
    """Layers that stayed in 16 bits since the scheme's groups do not divide them."""
    pareto: bool = False
    """Whether no other trial beats it in both size and KL, the plain 16-bit cast included."""
    reload_error: str | None = None
    """Why a finalist did not survive its reload."""
    refused: str | None = None
    """Why the runtime that the search is for does not serve it; then it is no finalist."""


class FailedTrial(FormatModel):
    """A scheme that cannot be applied to the model."""

    status: Literal["failed"] = "failed"
    scheme: str
    """The scheme's name."""
    config: dict[str, Any]
    """The scheme's fields."""
    seconds: float
    error: str


Trial = Annotated[DoneTrial | FailedTrial, Field(discriminator="status")]
"""One scheme: what it measured, or why it failed."""


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
    kept_layers: tuple[str, ...] = ()
    """Layers that stayed in 16 bits since the scheme's groups do not divide them."""


class Search(JsonFormat):
    """`search.json`."""

    FILE: ClassVar = "search.json"

    base: str
    """Fingerprint of the model that was quantized."""
    base_bytes: int
    """Its weights in 16 bits: compression by a cast alone does not count."""
    max_kl: float
    """Nats per token that the chosen scheme may have."""
    trials: tuple[Trial, ...]
    """In the order in which they were proposed."""
    finalists: tuple[Finalist, ...]
    chosen: str | None
    """Name of the smallest finalist within `max_kl`, if any."""
