"""`speed.json`: latency, throughput and memory of each candidate on one kind of machine."""

from typing import ClassVar

from stages.formats.json_format import FormatModel, JsonFormat

__all__ = ["CandidateSpeed", "Speed"]


class CandidateSpeed(FormatModel):
    """One candidate's figures; None, with the reason, where they were not measured."""

    prefill_p50_ms: float | None = None
    prefill_p95_ms: float | None = None
    latency_p50_ms: float | None = None
    """Median milliseconds of one decode step."""
    latency_p95_ms: float | None = None
    tokens_per_second: float | None = None
    peak_memory_bytes: int | None = None
    reason: str | None = None
    """Why the figures are absent."""

    @property
    def figures(self) -> dict[str, float]:
        """Those that were measured, by their names."""
        return {name: value for name, value in self if name != "reason" and value is not None}


class Speed(JsonFormat):
    """`speed.json`."""

    FILE: ClassVar = "speed.json"

    device: str
    threads: int
    dtype: str
    batch_size: int
    prompt_tokens: int
    new_tokens: int
    repeats: int
    models: dict[str, CandidateSpeed]
