"""`scores.json`: the quality of each candidate; `documents.parquet` beside it holds sums for each document."""

from typing import ClassVar

from stages.contract import Split
from stages.formats.json_format import FormatModel, JsonFormat

__all__ = ["REFERENCE", "CandidateScores", "ReferenceScores", "Scores"]

REFERENCE = "@reference"
"""Name of the reference's rows in `documents.parquet` where it is not among the models; no step can be named so."""


class CandidateScores(FormatModel):
    """One candidate's scores."""

    fingerprint: str
    """Of the artifact that holds the candidate."""
    folder: str
    """The checkpoint's logical folder in it."""
    uri_prefix: str
    """URI of the folder to load the checkpoint from."""
    kind: str
    """How it was made: `model`, `quantized`, `pruned`, …; for people, nothing depends on it."""
    base: str | None
    """Name of the candidate that it was derived from, or `REFERENCE`, where that was scored."""
    base_fingerprint: str | None
    """Fingerprint of the artifact that it was derived from, if any."""
    method: str | None
    """How it was derived, e.g. a scheme's name."""
    axes: dict[str, str]
    """Shape and number format, for plots."""
    parameters: int
    size_bytes: int
    bits_per_weight: float
    compression_x: float
    """The reference's bytes in 16 bits a weight over the candidate's."""
    cross_entropy: float
    """Nats per token."""
    perplexity: float
    bits_per_byte: float
    """Bits per byte of the text's UTF-8: comparable between tokenizers."""
    kl_to_reference: float
    """Mean KL(reference ‖ candidate), nats per token."""
    agreement: float
    """Fraction of tokens where candidate and reference find the same token likeliest."""
    kl_to_base: float | None
    """Mean KL(base ‖ candidate), nats per token; None where no base was scored."""
    agreement_with_base: float | None


class ReferenceScores(FormatModel):
    """The scores of what candidates are compared with, and is none."""

    text: str
    """What it is."""
    cross_entropy: float
    perplexity: float
    bits_per_byte: float
    kl_to_reference: float | None = None
    agreement: float | None = None


class Scores(JsonFormat):
    """`scores.json`."""

    FILE: ClassVar = "scores.json"
    SCHEMA: ClassVar = 2

    split: Split
    dtype: str
    tokens: int
    text_bytes: int
    """Bytes of the scored tokens' text in UTF-8."""
    documents: int
    rows: int
    dataset_fingerprint: str
    reference: str | None
    """The reference's name among the models; None where it is not among them."""
    reference_fingerprint: str
    reference_bytes: int
    reference_bytes_16bit: int
    """The reference's bytes in 16 bits a weight: what compression is told against."""
    bigram: ReferenceScores | None = None
    """A Kneser-Ney model of the training tokens, which a model worth its name beats; None without such tokens."""
    trigram: ReferenceScores | None = None
    noise_floor: ReferenceScores | None = None
    """The reference run again in other batches: differences below its KL are rounding."""
    models: dict[str, CandidateScores]
