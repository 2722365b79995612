"""The limits that a candidate must keep; `checks.py` applies them. Light: config only.

There are no default limits: what may be lost depends on what the model is for, so without one nothing is promoted.

Limits against the base hold for candidates that were derived from another one (quantized, pruned, merged, …); those
against the teacher, of size and of speed hold for every candidate.
"""

from pydantic import Field

from stages.contract import Config

__all__ = ["Gate"]


class Gate(Config):
    """Limits; None checks nothing."""

    max_kl_to_base: float | None = Field(None, gt=0)
    """Mean KL(base ‖ candidate), nats per token: how far deriving it from its base moved the distribution."""
    min_agreement_with_base: float | None = Field(None, ge=0, le=1)
    """Fraction of tokens for which the candidate and its base find the same token likeliest."""
    max_perplexity_increase_fraction: float | None = Field(None, ge=0)
    """Perplexity of the candidate over its base's, minus 1."""
    max_kl_to_teacher: float | None = Field(None, gt=0)
    """Mean KL(teacher ‖ candidate), nats per token."""
    min_agreement_with_teacher: float | None = Field(None, ge=0, le=1)
    """Fraction of tokens for which candidate and teacher find the same token likeliest."""
    max_perplexity_ratio_to_teacher: float | None = Field(None, gt=0)
    """Perplexity of the candidate over the teacher's."""
    min_compression_x: float | None = Field(None, gt=0)
    """The teacher's bytes in 16 bits a weight over the candidate's on disk."""
    max_size_bytes: int | None = Field(None, gt=0)
    """Bytes of the weights on disk."""
    max_latency_p50_ms: float | None = Field(None, gt=0)
    """Median milliseconds of one decode step; a candidate whose speed is not measured does not keep it."""
    max_peak_memory_bytes: int | None = Field(None, gt=0)
    """Peak bytes of a generation; a candidate whose memory is not measured does not keep it."""

    @property
    def limits(self) -> dict[str, float]:
        """Those that are set, by their names."""
        return {name: bound for name, bound in self if isinstance(bound, int | float)}
