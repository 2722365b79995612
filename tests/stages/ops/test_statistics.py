"""Intervals over documents and seeds: against exhaustive enumeration and scipy, their errors, and their limits."""

import itertools

import numpy as np
import pytest
from scipy.stats import false_discovery_control, permutation_test

from benchmarks.verdict_coverage import LENGTHS, estimate_planted, planted
from stages.ops import statistics
from stages.ops.statistics import Estimate, Interval, Resamples, effective_number, holm


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


def resample(columns: dict[str, np.ndarray], **options: int) -> Resamples:
    return Resamples({key: value for key, value in columns.items() if key != "tokens"}, columns["tokens"], **options)


def gain_of(gain: float, *, seed: int, num_seeds: int = 1, seed_spread: float = 0.0) -> Estimate:
    """Compare two methods on documents of the corpus's lengths, one of which is better by `gain`."""
    return estimate_planted(*planted(gain, seed=seed, num_seeds=num_seeds, seed_spread=seed_spread), seed=seed)


def difference(sums):
    return (sums["a"] - sums["b"]) / sums["tokens"]


def test_interval_agrees_with_all_subsets_of_the_documents():
    columns = documents(13, seed=1)
    subsets = np.array(list(itertools.product([0, 1], repeat=13)))[1:]
    figures = (subsets @ (columns["a"] - columns["b"])) / (subsets @ columns["tokens"])
    found = resample(columns, num_resamples=100_000).estimate(difference)
    low, high = np.quantile(figures, [0.025, 0.975])
    interval = found.interval()
    assert interval.estimate == pytest.approx(difference({key: value.sum() for key, value in columns.items()}))
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=0.02 * (high - low))


def test_p_value_is_that_of_scipys_test_with_flipped_signs():
    columns = documents(12, seed=2, shift=0.03)
    bound = 0.01
    excess = columns["a"] - columns["b"] - bound * columns["tokens"]
    theirs = permutation_test(
        (excess,), np.sum, permutation_type="samples", alternative="greater", n_resamples=np.inf
    ).pvalue
    ours = resample(columns, num_resamples=100_000).estimate(difference).p_below(bound)
    assert ours == pytest.approx(theirs, abs=0.004)
    assert 0.01 < ours < 0.5


def test_claim_between_equally_good_models_is_made_rarely_with_the_corpus_own_lengths():
    false_claims = sum(gain_of(0.0, seed=seed).interval().low > 0 for seed in range(200))
    assert false_claims / 200 <= 0.05


def test_gain_as_large_as_the_minimum_detectable_one_is_found_four_times_of_five():
    smallest = [gain_of(0.0, seed=seed).minimum_detectable() for seed in range(200)]
    found = sum(gain_of(gain, seed=1000 + seed).interval().low > 0 for seed, gain in enumerate(smallest))
    assert found / 200 >= 0.8


def test_claim_of_a_method_is_made_rarely_where_only_the_seeds_differ():
    """Three seeds a side: drawing them with replacement would make the claim in 11 to 15 % of trials."""
    claims = [gain_of(0.0, seed=seed, num_seeds=3, seed_spread=0.09).interval().low > 0 for seed in range(200)]
    assert sum(claims) / 200 <= 0.05


def test_gain_over_seeds_is_wider_than_over_documents_alone_and_the_same_figure():
    three, one = (gain_of(0.1, seed=3, num_seeds=number, seed_spread=0.0) for number in (3, 1))
    assert three.interval().high - three.interval().low == pytest.approx(one.interval().high - one.interval().low)
    apart = gain_of(0.1, seed=3, num_seeds=3, seed_spread=0.09)
    assert apart.interval().high - apart.interval().low > 2 * (one.interval().high - one.interval().low)


def test_gain_of_unequal_numbers_of_seeds_has_both_sides_spread():
    rng = np.random.default_rng(0)
    tokens = np.full(50, 100.0)
    columns = {f"a{s}": tokens * (2 + offset) for s, offset in enumerate(rng.normal(0, 0.1, 4))}
    columns |= {f"b{s}": tokens * (2 + offset) for s, offset in enumerate(rng.normal(0, 0.1, 3))}
    found = Resamples(columns, tokens).gain(["a0", "a1", "a2", "a3"], ["b0", "b1", "b2"]).interval()
    assert found.high - found.low > 4 * np.sqrt(0.1**2 / 4 + 0.1**2 / 3)
    assert found.low < 0 < found.high


def test_two_seeds_a_side_tell_nothing_of_seeds():
    tokens = np.full(50, 100.0)
    columns = {name: tokens * value for name, value in {"a0": 2.0, "a1": 2.4, "b0": 1.9, "b1": 2.3}.items()}
    found = Resamples(columns, tokens).gain(["a0", "a1"], ["b0", "b1"]).interval()
    assert (found.low, found.high) == pytest.approx((0.1, 0.1))


def test_effective_number_is_that_of_equally_long_documents():
    assert effective_number([7, 7, 7]) == pytest.approx(3)
    assert effective_number([1e9, 1, 1]) == pytest.approx(1)
    assert effective_number(LENGTHS) == pytest.approx(9.71, abs=0.01)


def test_holm_agrees_with_its_definition_and_is_milder_than_bonferroni():
    p = [0.01, 0.04, 0.03, 0.005]
    assert holm(p) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert all(ours <= 4 * each for ours, each in zip(holm(p), p, strict=True))
    assert all(ours >= fdr - 1e-12 for ours, fdr in zip(holm(p), false_discovery_control(p), strict=True))
    assert holm([]) == []
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_interval_of_a_model_against_itself_is_exactly_zero():
    columns = documents(50, seed=3)
    found = resample({**columns, "b": columns["a"]}, num_resamples=500).estimate(difference)
    assert found.interval() == Interval(0.0, 0.0, 0.0)


def test_few_documents_show_nothing_however_much_they_agree():
    columns = {"a": np.full(5, 30.0), "b": np.full(5, 10.0), "tokens": np.full(5, 10.0)}
    assert resample(columns).estimate(difference).p_below(0.0) == 0.5**5 > 0.025
    more = {key: np.repeat(value, 2) for key, value in columns.items()}
    assert resample(more).estimate(difference).p_below(0.0) < 0.025


def test_interval_with_an_equal_seed_is_equal_whatever_the_batch(monkeypatch):
    columns = documents(64, seed=4)
    whole = resample(columns, num_resamples=400, seed=5).estimate(difference).interval()
    monkeypatch.setattr(statistics, "BATCH_BYTES", 64 * 8 * 7)
    split = resample(columns, num_resamples=400, seed=5).estimate(difference).interval()
    other = resample(columns, num_resamples=400, seed=6).estimate(difference).interval()
    assert (split.low, split.high) == pytest.approx((whole.low, whole.high), rel=1e-9)
    assert other != whole


def test_interval_of_a_paired_difference_is_narrower_than_either_models():
    drawn = resample(documents(200, seed=6), num_resamples=1000)
    paired, single = (drawn.estimate(each).interval() for each in (difference, lambda s: s["a"] / s["tokens"]))
    assert paired.high - paired.low < 0.2 * (single.high - single.low)


@pytest.mark.parametrize(
    ("columns", "tokens"),
    [({"a": [1.0]}, [1]), ({"a": [1.0, 2.0], "b": [1.0]}, [1, 1]), ({"a": [1.0, float("nan")]}, [1, 1])],
    ids=["one document", "different lengths", "not finite"],
)
def test_resampling_of_unfit_columns_is_refused(columns, tokens):
    with pytest.raises(ValueError, match=r"two or more documents|not finite"):
        Resamples(columns, tokens)
