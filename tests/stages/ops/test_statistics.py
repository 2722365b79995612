"""The paired bootstrap: against scipy, its coverage, what it says of equal models, and its limits."""

import numpy as np
import pytest
from scipy.stats import bootstrap

from stages.ops import statistics
from stages.ops.statistics import Interval, PairedBootstrap


def documents(num_documents: int, *, seed: int, shift: float = 0.0) -> dict[str, np.ndarray]:
    """Sums for documents of skewed lengths whose difficulty differs, scored by two models `a` and `b`."""
    rng = np.random.default_rng(seed)
    tokens = rng.geometric(1 / 60, num_documents).astype(float)
    difficulty = rng.gamma(4.0, 0.8, num_documents)
    noise = rng.normal(0, 0.3, (2, num_documents)) / np.sqrt(tokens)
    return {
        "tokens": tokens,
        "a": tokens * (difficulty + noise[0]),
        "b": tokens * (difficulty + noise[1] - shift),
    }


def difference(sums):
    return (sums["a"] - sums["b"]) / sums["tokens"]


@pytest.mark.parametrize("column", ["a", "b"])
def test_interval_of_a_ratio_of_sums_agrees_with_scipy(column):
    columns = documents(80, seed=1)
    ours = PairedBootstrap(columns, num_resamples=40_000, seed=2).interval(lambda s: s[column] / s["tokens"])
    theirs = bootstrap(
        (columns[column], columns["tokens"]),
        lambda n, d, axis: n.sum(axis=axis) / d.sum(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=40_000,
        method="BCa",
        rng=np.random.default_rng(3),
    ).confidence_interval
    width = theirs.high - theirs.low
    assert ours.estimate == pytest.approx(columns[column].sum() / columns["tokens"].sum(), rel=1e-12)
    assert ours.low == pytest.approx(theirs.low, abs=0.03 * width)
    assert ours.high == pytest.approx(theirs.high, abs=0.03 * width)


def test_interval_covers_the_truth_about_as_often_as_it_says():
    hits = 0
    for seed in range(400):
        found = PairedBootstrap(documents(100, seed=seed, shift=0.05), num_resamples=1000, seed=seed).interval(
            difference
        )
        hits += found.low <= 0.05 <= found.high
    assert 0.91 <= hits / 400 <= 0.98


def test_interval_of_two_equally_good_models_excludes_zero_rarely():
    false_claims = 0
    for seed in range(400):
        found = PairedBootstrap(documents(100, seed=1000 + seed), num_resamples=1000, seed=seed).interval(difference)
        false_claims += found.low > 0
    assert false_claims / 400 <= 0.05  # one-sided 2.5 %; 0.05 is more than three standard errors above


def test_interval_of_a_model_against_itself_is_exactly_zero():
    columns = documents(50, seed=3)
    found = PairedBootstrap({**columns, "b": columns["a"]}, num_resamples=500).interval(difference)
    assert found == Interval(0.0, 0.0, 0.0)


def test_interval_where_nothing_varies_is_a_point():
    columns = {"tokens": np.full(10, 7.0), "agree": np.full(10, 7.0)}
    found = PairedBootstrap(columns, num_resamples=300).interval(lambda s: s["agree"] / s["tokens"])
    assert found == Interval(1.0, 1.0, 1.0)


def test_interval_with_an_equal_seed_is_equal_whatever_the_batch(monkeypatch):
    columns = documents(64, seed=4)
    whole = PairedBootstrap(columns, num_resamples=400, seed=5).interval(difference)
    monkeypatch.setattr(statistics, "BATCH_BYTES", 64 * 8 * 7)
    split = PairedBootstrap(columns, num_resamples=400, seed=5).interval(difference)
    other = PairedBootstrap(columns, num_resamples=400, seed=6).interval(difference)
    assert (split.low, split.high) == pytest.approx((whole.low, whole.high), rel=1e-9)
    assert other != whole


def test_interval_of_a_paired_difference_is_narrower_than_either_models():
    columns = documents(200, seed=6)
    drawn = PairedBootstrap(columns, num_resamples=1000)
    paired, single = drawn.interval(difference), drawn.interval(lambda s: s["a"] / s["tokens"])
    assert paired.high - paired.low < 0.2 * (single.high - single.low)


@pytest.mark.parametrize(
    "columns",
    [{"a": [1.0]}, {"a": [1.0, 2.0], "b": [1.0]}, {"a": [1.0, float("nan")]}],
    ids=["one document", "different lengths", "not finite"],
)
def test_bootstrap_of_unfit_columns_is_refused(columns):
    with pytest.raises(ValueError, match=r"two or more documents|not finite"):
        PairedBootstrap(columns)
