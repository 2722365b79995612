"""Intervals for what is measured on held-out text: the document is the unit, whatever its length.

Tokens of one document are not independent, nor are blocks of it: over the 42 validation documents of the Python docs
(19 to 14,776 tokens) the gain of one student over another has the standard error 0.019 by documents, 0.0066 by blocks
of 512 tokens, 0.0028 by tokens. A document of more than 133 tokens differs by its own nature (0.062 nats per token),
not by chance. So documents are not cut into blocks: such intervals would be three times too narrow.

Few long documents then carry a figure: those 42 are worth `effective_number` = 9.7 equally long ones. A bootstrap is
too narrow there (BCa errs on one side in 5 to 8 % of trials with these lengths, instead of 2.5 %). So each resample is
a random half of the documents: an interval between quantiles of such halves' figures covers exactly, for any lengths
and any variances, where documents err symmetrically (Hartigan 1969, "Using subsample values as typical values", JASA
64:1303); it is the test of flipped signs turned round. It errs in 2.3 to 2.9 % of trials with these lengths, in 3 to
4 % at the upper end of a KL, which is skewed. `benchmarks/verdict_coverage.py` counts both methods' errors.

Promises: one draw serves every statistic of every model, so comparisons are paired; equal seeds give equal intervals;
memory is bounded whatever the number of documents.
Does not: correct for a model having been selected on the same documents.

Shapes: D documents, C columns, R resamples, S seeds (models of one method).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["ALPHA", "MIN_SEEDS", "Estimate", "Interval", "Resamples", "effective_number", "holm"]

Floats = NDArray[np.float64]
Statistic = Callable[[Mapping[str, Floats]], Any]
"""Computes a figure from sums over documents, by column name; elementwise, since it is given arrays of such sums."""

ALPHA = 0.025
"""One-sided level of every claim: a two-sided interval of 95 % excludes the bound."""
MIN_SEEDS = 3
"""Models of each side from which the spread over training seeds can be told."""
BATCH_BYTES = 32 * 1024 * 1024
"""Memory for the draws of one batch of resamples; larger was not faster (the draws then leave the cache)."""


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and its two-sided confidence interval."""

    estimate: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and what it would have been for other texts (and seeds) of the same kind."""

    value: float
    drawn_R: Floats
    dof: float
    """Degrees of freedom of its spread: half of the effective number of documents, or what few seeds leave of that."""
    smallest_p: float
    """With D documents nothing is shown at a level below 2⁻ᴰ: so often all of them err to one side by chance."""

    def interval(self, confidence: float = 0.95) -> Interval:
        """Return the figure with its two-sided interval."""
        low, high = np.quantile(self.drawn_R, [(1 - confidence) / 2, (1 + confidence) / 2])
        return Interval(self.value, float(low), float(high))

    def p_above(self, bound: float) -> float:
        """Return the one-sided p-value against the figure being above a bound: small shows that it is not."""
        return self._p(int((self.drawn_R > bound).sum()))

    def p_below(self, bound: float) -> float:
        """Return the one-sided p-value against the figure being below a bound."""
        return self._p(int((self.drawn_R < bound).sum()))

    def _p(self, num_against: int) -> float:
        return max(max(num_against, 1) / len(self.drawn_R), self.smallest_p)

    def minimum_detectable(self, power: float = 0.8) -> float:
        """Return how large a true difference must be for a new comparison of this kind to show it.

        With `h` half of the interval, `s = h / 1.96`, and a spread with `ν` degrees of freedom, so known to a relative
        variance of 1/2ν only, both here and in that comparison: `c = k + z √(1 + (k² + c²) / 2ν)` in units of `s`,
        where `k = 1.96` and `z` is the normal's quantile at `power`.
        """
        from scipy.special import ndtri

        found = self.interval()
        k, z, noise = float(ndtri(1 - ALPHA)), float(ndtri(power)), 1 / (2 * self.dof)
        first, last = 1 - z * z * noise, k * k - z * z * (1 + k * k * noise)
        return (k + math.sqrt(k * k - first * last)) / first * (found.high - found.low) / (2 * k)


class Resamples:
    """Halves the documents at random, many times, and gives the estimate of any statistic of sums over documents."""

    def __init__(self, columns: Mapping[str, Any], tokens: Any, *, num_resamples: int = 10_000, seed: int = 0) -> None:
        """Draw the resamples.

        Args:
            columns: name → sums for each document `[D]`; the same documents in the same order in each.
            tokens: each document's tokens `[D]`; a column of this name is added.
            num_resamples: how many random subsets are drawn.
            seed: seed of the draws.

        Raises:
            ValueError: fewer than two documents, columns of different lengths, or a value that is not finite.
        """
        columns = {**columns, "tokens": tokens}
        self._names = tuple(columns)
        lengths = {len(columns[name]) for name in self._names}
        if len(lengths) != 1 or min(lengths) < 2:
            raise ValueError(f"resampling needs two or more documents, the same for all columns; got {lengths}")
        values_DC = np.stack([np.asarray(columns[name], dtype=np.float64) for name in self._names], axis=1)
        bad = [name for index, name in enumerate(self._names) if not np.isfinite(values_DC[:, index]).all()]
        if bad:
            raise ValueError(f"columns {bad} hold values that are not finite")
        # Equal columns are summed once: a matrix product may round its columns differently, and a model against
        # itself must differ by exactly 0, not by 1e-17.
        distinct_DC, which_C = np.unique(values_DC, axis=1, return_inverse=True)
        self.num_documents, self.effective = len(values_DC), effective_number(tokens)
        self._rng = np.random.default_rng([seed, 1])
        self._total_C = distinct_DC.sum(axis=0)[which_C]
        self._drawn_RC = _draw_sums(distinct_DC, num_resamples=num_resamples, seed=seed)[:, which_C]

    def value(self, statistic: Statistic) -> float:
        """Return the statistic of all documents."""
        return float(self._apply(statistic, self._total_C[None])[0])

    def estimate(self, statistic: Statistic) -> Estimate:
        """Return the statistic of all documents with its draws.

        Raises:
            ValueError: the statistic is not finite for some resample.
        """
        value, drawn_R = self.value(statistic), self._apply(statistic, self._drawn_RC)
        if not (np.isfinite(value) and np.isfinite(drawn_R).all()):
            raise ValueError("the statistic is not finite for every resample of the documents")
        return Estimate(value, drawn_R, self.effective / 2, 0.5**self.num_documents)

    def gain(self, baselines: Sequence[str], contenders: Sequence[str]) -> Estimate:
        """Return how much lower the mean of the contenders' columns is than that of the baselines', per token.

        Documents are paired, since all models are scored on the same ones. With `MIN_SEEDS` columns or more on each
        side the draws are over training seeds as well: to each half of the documents is added Student's t with S - 1
        degrees of freedom times the standard error over seeds. (Drawing 3 seeds with replacement, as a hierarchical
        bootstrap does, claims a gain where there is none in 11 to 15 % of trials: Student's quantile is 4.3 there,
        not 1.96.) Columns at one place of both lists are a pair, of the same seed, where there are as many of both.
        """
        ours, theirs = list(contenders), list(baselines)
        found = self.estimate(lambda sums: (_average(sums, theirs) - _average(sums, ours)) / sums["tokens"])
        if min(len(ours), len(theirs)) < MIN_SEEDS:
            return found
        ours_S, theirs_S = (np.array([self.value(_per_token(name)) for name in names]) for names in (ours, theirs))
        drawn_R, dof = found.drawn_R, found.dof
        for sample_S in [theirs_S - ours_S] if len(ours) == len(theirs) else [ours_S, theirs_S]:
            error = float(sample_S.std(ddof=1)) / math.sqrt(len(sample_S))
            drawn_R = drawn_R + error * self._rng.standard_t(len(sample_S) - 1, len(drawn_R))
            dof = min(dof, len(sample_S) - 1)
        return Estimate(found.value, drawn_R, dof, found.smallest_p)

    def _apply(self, statistic: Statistic, sums_NC: Floats) -> Floats:
        by_name = {name: sums_NC[:, index] for index, name in enumerate(self._names)}
        return np.broadcast_to(np.asarray(statistic(by_name), dtype=np.float64), sums_NC.shape[:1])


def effective_number(tokens_D: Any) -> float:
    """Return how many equally long documents these are worth: `(Σ n)² / Σ n²` (Kish)."""
    lengths_D = np.asarray(tokens_D, dtype=np.float64)
    return float(lengths_D.sum() ** 2 / (lengths_D**2).sum())


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for there being several (Holm 1979): those at most α hold together at level α."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, largest = [0.0] * len(order), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def _average(sums: Mapping[str, Floats], names: Sequence[str]) -> Any:
    return sum(sums[name] for name in names) / len(names)


def _per_token(name: str) -> Statistic:
    return lambda sums: sums[name] / sums["tokens"]


def _draw_sums(values_DC: Floats, *, num_resamples: int, seed: int) -> Floats:
    """Return the sums `[R, C]` of random subsets of the documents: each is in one or not, as a coin falls."""
    rng = np.random.default_rng(seed)
    num_documents = len(values_DC)
    batch = max(1, BATCH_BYTES // (num_documents * 8))
    # Centered first, so that statistics of columns that hardly vary are not lost in the rounding of large sums.
    mean_C = values_DC.mean(axis=0)
    centered_DC = values_DC - mean_C
    drawn = []
    for start in range(0, num_resamples, batch):
        size = min(batch, num_resamples - start)
        coins = rng.integers(0, 256, size=(size, -(-num_documents // 8)), dtype=np.uint8)
        chosen_ND = np.unpackbits(coins, axis=1, count=num_documents).astype(np.float64)
        chosen_ND[~chosen_ND.any(axis=1)] = 1.0  # no document gives no figure
        drawn.append(chosen_ND @ centered_DC + chosen_ND.sum(axis=1)[:, None] * mean_C)
    return np.concatenate(drawn)
