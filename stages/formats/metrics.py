"""The table of metrics by which people compare candidates: the `final/*` metrics of `report.json`, once for all.

The leaderboard in the terminal and in Markdown, `compare` and MLflow's saved view show the same columns in the same
order, with these labels and formats. Does not: hold values, or know where they come from.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

__all__ = ["METRICS", "PRIMARY_METRIC", "UNKNOWN", "Metric", "droppable_labels", "known_columns"]

UNKNOWN = "–"
"""What a table shows where a candidate lacks a metric."""
PRIMARY_METRIC = "final/kl_to_teacher"
"""By which candidates are ordered where nothing else is asked: the one figure of quality that all of them have."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric of a candidate."""

    name: str
    """Its key: `final/…`."""
    label: str
    """Heading of its column, with the unit that is shown."""
    unit: str
    """Unit of the value that is stored."""
    better: Literal["lower", "higher"] | None
    """Which values are better; None where neither is."""
    show: Callable[[float], str]
    """Writes a value as a cell of a table."""
    column: int | None = None
    """None where tables leave it out; 0 where they always show it; else narrow ones drop the highest number first."""

    def cell(self, metrics: Mapping[str, float]) -> str:
        """Return a candidate's cell."""
        return self.show(metrics[self.name]) if self.name in metrics else UNKNOWN


def _fixed(digits: int) -> Callable[[float], str]:
    return lambda value: f"{value:,.{digits}f}"


def _megabytes(value: float) -> str:
    return f"{value / 1e6:.2f}" if value < 1e8 else f"{value / 1e6:,.0f}"


def _perplexity(value: float) -> str:
    return f"{value:.4g}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


METRICS: tuple[Metric, ...] = (
    Metric("final/size_bytes", "size MB", "bytes", "lower", _megabytes, 0),
    Metric("final/compression_x", "x smaller", "x", "higher", _fixed(2), 3),
    Metric("final/bits_per_weight", "bits/weight", "bits", "lower", _fixed(2), 0),
    Metric("final/perplexity", "perplexity", "", "lower", _perplexity, 0),
    Metric("final/bits_per_byte", "bits/byte", "bits", "lower", _fixed(3), 9),
    Metric("final/kl_to_teacher", "KL to teacher", "nats/token", "lower", _fixed(4), 0),
    Metric("final/agreement", "agreement %", "fraction", "higher", _percent, 1),
    Metric("final/kl_to_base", "KL to base", "nats/token", "lower", _fixed(4), 4),
    Metric("final/latency_p50_ms", "ms/token p50", "ms", "lower", _fixed(2), 2),
    Metric("final/latency_p95_ms", "ms/token p95", "ms", "lower", _fixed(2), 7),
    Metric("final/tokens_per_second", "tokens/s", "tokens/s", "higher", _fixed(0), 6),
    Metric("final/throughput_tokens_per_second", "tokens/s batch", "tokens/s", "higher", _fixed(0)),
    Metric("final/peak_memory_bytes", "memory MB", "bytes", "lower", lambda value: f"{value / 1e6:,.1f}", 8),
    Metric("final/cost_seconds", "cost s", "seconds", "lower", _fixed(0), 5),
    Metric("final/cross_entropy", "cross-entropy", "nats/token", "lower", _fixed(4)),
    Metric("final/parameters", "parameters", "", None, _fixed(0)),
    Metric("final/agreement_with_base", "agreement with base %", "fraction", "higher", _percent),
    Metric("final/perplexity_delta_to_teacher", "perplexity over teacher's", "", "lower", _perplexity),
    Metric("final/perplexity_delta_to_base", "perplexity over base's", "", "lower", _perplexity),
    Metric("final/prefill_p50_ms", "first token ms p50", "ms", "lower", _fixed(2)),
    Metric("final/prefill_p95_ms", "first token ms p95", "ms", "lower", _fixed(2)),
)
"""Every metric that a candidate may have, the columns of tables in their order first. The base of `…_base` is
the model that a candidate was derived from; `final/cost_seconds` is what all steps before a candidate took."""


def known_columns(candidates: Iterable[Mapping[str, float]]) -> list[Metric]:
    """Return the columns of a table of candidates, given their metrics; what none of them has is left out."""
    rows = list(candidates)
    return [metric for metric in METRICS if metric.column is not None and any(metric.name in row for row in rows)]


def droppable_labels() -> list[str]:
    """Return the labels of the columns that a narrow terminal leaves out, the first to go first."""
    droppable = [metric for metric in METRICS if metric.column]
    return [metric.label for metric in sorted(droppable, key=lambda metric: -(metric.column or 0))]
