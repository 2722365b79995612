"""Intervals for what is measured on held-out text: a paired bootstrap over documents.

Tokens of one document are not independent, documents nearly are; so documents are drawn with replacement, and every
figure (perplexity, divergence, agreement, and the differences of two models) is computed anew from the sums over the
documents drawn. Intervals are bias-corrected and accelerated (BCa; Efron 1987, doi:10.1080/01621459.1987.10478410).

Promises: one draw serves every statistic of every model, so comparisons are paired; equal seeds give equal intervals;
memory is bounded whatever the number of documents. `scipy.stats.bootstrap` computes the same for one statistic (the
tests compare the two); it draws anew for each, which costs a hundredfold with a gate of ten limits over ten models,
while sums over documents come from one matrix product of draw counts.

Does not: correct for many comparisons, or for a model having been selected on the same documents.

Shapes: D documents, C columns, R resamples.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Interval", "PairedBootstrap", "Statistic"]

Floats = NDArray[np.float64]
Statistic = Callable[[Mapping[str, Floats]], Any]
"""Computes a figure from sums over documents, by column name; elementwise, since it is given arrays of such sums."""

BATCH_BYTES = 32 * 1024 * 1024
"""Memory for the draws of one batch of resamples; larger was not faster (the draws then leave the cache)."""


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and its two-sided confidence interval."""

    estimate: float
    low: float
    high: float


class PairedBootstrap:
    """Resamples documents once, and gives the interval of any statistic of sums over documents."""

    def __init__(self, columns: Mapping[str, Any], *, num_resamples: int = 10_000, seed: int = 0) -> None:
        """Draw the resamples.

        Args:
            columns: name → sums for each document `[D]`; the same documents in the same order in each.
            num_resamples: how many times D documents are drawn with replacement.
            seed: seed of the draws.

        Raises:
            ValueError: fewer than two documents, columns of different lengths, or a value that is not finite.
        """
        self._names = tuple(columns)
        lengths = {len(columns[name]) for name in self._names}
        if len(lengths) != 1 or min(lengths) < 2:
            raise ValueError(f"a paired bootstrap needs two or more documents, the same for all columns; got {lengths}")
        values_DC = np.stack([np.asarray(columns[name], dtype=np.float64) for name in self._names], axis=1)
        bad = [name for index, name in enumerate(self._names) if not np.isfinite(values_DC[:, index]).all()]
        if bad:
            raise ValueError(f"columns {bad} hold values that are not finite")
        # Equal columns are summed once: a matrix product may round its columns differently, and a model against
        # itself must differ by exactly 0, not by 1e-17.
        distinct_DC, which_C = np.unique(values_DC, axis=1, return_inverse=True)
        self._total_C = distinct_DC.sum(axis=0)[which_C]
        self._without_one_DC = self._total_C - values_DC
        self._drawn_RC = _draw_sums(distinct_DC, num_resamples=num_resamples, seed=seed)[:, which_C]

    def estimate(self, statistic: Statistic) -> float:
        """Return the statistic of all documents."""
        return float(self._apply(statistic, self._total_C[None])[0])

    def interval(self, statistic: Statistic, *, confidence: float = 0.95) -> Interval:
        """Return the statistic of all documents with its BCa interval.

        Raises:
            ValueError: the statistic is not finite for some resample.
        """
        estimate = self.estimate(statistic)
        drawn_R = self._apply(statistic, self._drawn_RC)
        if not (np.isfinite(estimate) and np.isfinite(drawn_R).all()):
            raise ValueError("the statistic is not finite for every resample of the documents")
        low, high = _bca_levels(drawn_R, estimate, self._apply(statistic, self._without_one_DC), confidence)
        ends = np.quantile(drawn_R, [low, high])
        return Interval(estimate, float(ends[0]), float(ends[1]))

    def _apply(self, statistic: Statistic, sums_NC: Floats) -> Floats:
        by_name = {name: sums_NC[:, index] for index, name in enumerate(self._names)}
        return np.broadcast_to(np.asarray(statistic(by_name), dtype=np.float64), sums_NC.shape[:1])


def _draw_sums(values_DC: Floats, *, num_resamples: int, seed: int) -> Floats:
    """Return the sums `[R, C]` of each resample of the documents."""
    rng = np.random.default_rng(seed)
    num_documents = len(values_DC)
    batch = max(1, BATCH_BYTES // (num_documents * 8))
    # Centered first: a resample's sum is D times the mean plus the drawn deviations, so that statistics of columns
    # that hardly vary are not lost in the rounding of large sums.
    mean_C = values_DC.mean(axis=0)
    centered_DC = values_DC - mean_C
    drawn = []
    for start in range(0, num_resamples, batch):
        size = min(batch, num_resamples - start)
        picks = rng.integers(num_documents, size=(size, num_documents))
        picks += np.arange(size)[:, None] * num_documents
        counts = np.bincount(picks.ravel(), minlength=size * num_documents).reshape(size, num_documents)
        drawn.append(counts.astype(np.float64) @ centered_DC)
    sums_RC: Floats = np.concatenate(drawn) + num_documents * mean_C
    return sums_RC


def _bca_levels(drawn_R: Floats, estimate: float, without_one_D: Floats, confidence: float) -> tuple[float, float]:
    """Return the quantile levels of a BCa interval (Efron & Tibshirani 1993, eqs. 14.10 to 14.15).

    `estimate` and the draws may tie (agreement that is 1 in every document): ties count half, as in scipy. Where
    nothing varies the levels do not matter, and the plain percentiles are returned.
    """
    from scipy.special import ndtr, ndtri

    tail = (1 - confidence) / 2
    below = (np.mean(drawn_R < estimate) + np.mean(drawn_R <= estimate)) / 2
    deviations_D = without_one_D.mean() - without_one_D
    spread = float((deviations_D**2).sum())
    if spread == 0 or below in (0.0, 1.0):
        return tail, 1 - tail
    acceleration = float((deviations_D**3).sum()) / (6 * spread**1.5)
    bias = float(ndtri(below))

    def level(z: float) -> float:
        return float(ndtr(bias + (bias + z) / (1 - acceleration * (bias + z))))

    return level(float(ndtri(tail))), level(float(ndtri(1 - tail)))
