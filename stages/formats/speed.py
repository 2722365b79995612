"""`speed.json`: latency, throughput and memory of each candidate in one runtime on one kind of machine."""

from typing import ClassVar

from pydantic import Field

from stages.formats.json_format import FormatModel, JsonFormat

__all__ = ["FIGURES", "CandidateSpeed", "SameText", "Speed"]


class SameText(FormatModel):
    """Whether a runtime computes what transformers does: its greedy tokens, judged by transformers' logits.

    transformers reads the prompt and the runtime's own tokens, so every position is judged, not only those up to the
    first difference.
    """

    tokens: int
    """Generated tokens that were compared."""
    differing: int
    """Of these, those that transformers finds less likely than another."""
    first_difference: int | None
    """Position of the first of them in its text, counted from the first generated token."""
    largest_gap: float
    """Logits by which transformers prefers its own token at most."""
    rounding: float
    """Logits by which transformers in this number format differs from itself in the next wider one at most."""
    holds: bool
    """Whether rounding explains the largest gap: each of two logits may err by it, in either of two runtimes."""

    @property
    def text(self) -> str:
        """The same as a sentence."""
        if not self.differing:
            return f"the same {self.tokens} tokens as transformers"
        first = (
            f"{self.differing} of {self.tokens} tokens differ from transformers', the first at {self.first_difference}"
        )
        explained = "rounding explains it" if self.holds else "rounding does not explain it"
        return f"{first}, by {self.largest_gap:.3g} logits at most: {explained} ({self.rounding:.3g})"


class CandidateSpeed(FormatModel):
    """One candidate's figures; None, with the reason, where they were not measured."""

    prefill_p50_ms: float | None = None
    """Median milliseconds from a prompt to its first token."""
    prefill_p95_ms: float | None = None
    latency_p50_ms: float | None = None
    """Median milliseconds of one decode step."""
    latency_p95_ms: float | None = None
    tokens_per_second: float | None = None
    """Generated tokens of the batch whose latency is measured."""
    throughput_tokens_per_second: float | None = None
    """Generated tokens of the largest batch that is measured."""
    peak_memory_bytes: int | None = None
    by_batch: dict[str, float] = Field(default_factory=dict)
    """Number of sequences at once → generated tokens per second."""
    dtype: str | None = None
    """The number format that it computed in."""
    runtime: str | None = None
    """Where it was measured: `transformers`, `vllm-cpu` or `vllm-cuda`."""
    served: bool | None = None
    """Whether the runtime loaded it and generated; None where it was not tried."""
    same_text: SameText | None = None
    """Whether the runtime computes what transformers does; None where it is transformers."""
    reason: str | None = None
    """Why figures are absent."""

    @property
    def figures(self) -> dict[str, float]:
        """Those that were measured, by their names."""
        values = {name: getattr(self, name) for name in FIGURES}
        return {name: value for name, value in values.items() if value is not None}


FIGURES = (
    "prefill_p50_ms",
    "prefill_p95_ms",
    "latency_p50_ms",
    "latency_p95_ms",
    "tokens_per_second",
    "throughput_tokens_per_second",
    "peak_memory_bytes",
)
"""The fields of a candidate that are figures with a unit."""


class Speed(JsonFormat):
    """`speed.json`."""

    FILE: ClassVar = "speed.json"
    SCHEMA: ClassVar = 2

    runtime: str
    """What served the models, with its version."""
    device: str
    threads: int
    dtype: str
    """Number format that was asked for; `stored` is that of each checkpoint."""
    batch_size: int
    throughput_batch_sizes: tuple[int, ...]
    prompt_tokens: int
    new_tokens: int
    repeats: int
    models: dict[str, CandidateSpeed]
