"""The front, the finalists' order, the choice and the reload's verdict: pure functions."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.quantize.selection import TrialPoint, choose, pareto_front, preference, rounding, verify

POINTS = st.lists(st.tuples(st.floats(0, 2), st.integers(1, 20)), min_size=1, max_size=12).map(
    lambda pairs: [TrialPoint(f"s{i}", kl, size) for i, (kl, size) in enumerate(pairs)]
)


def beats(one: TrialPoint, other: TrialPoint) -> bool:
    return (
        one.kl <= other.kl
        and one.size_bytes <= other.size_bytes
        and (one.kl, one.size_bytes) != (other.kl, other.size_bytes)
    )


@given(POINTS, st.integers(0, 9))
def test_front_holds_exactly_the_unbeaten_points_in_any_order(points: list[TrialPoint], seed: int) -> None:
    front = pareto_front(points)
    unbeaten = {(p.kl, p.size_bytes) for p in points if not any(beats(q, p) for q in points)}
    assert {(p.kl, p.size_bytes) for p in front} == unbeaten
    assert len(front) == len(unbeaten)
    random.Random(seed).shuffle(points)
    assert pareto_front(points) == front


@given(POINTS, st.floats(0.01, 2))
def test_preference_starts_with_the_favorite_and_holds_the_whole_front(points: list[TrialPoint], max_kl: float) -> None:
    front = pareto_front(points)
    order = preference(front, max_kl)
    assert sorted(order, key=lambda p: p.size_bytes) == list(front)
    within = [p for p in front if p.kl <= max_kl]
    assert order[0] == (min(within, key=lambda p: p.size_bytes) if within else min(front, key=lambda p: p.kl))


@given(POINTS, st.floats(0.01, 2))
def test_chosen_is_the_smallest_within_the_limit(points: list[TrialPoint], max_kl: float) -> None:
    chosen = choose(points, max_kl)
    within = [p.size_bytes for p in points if p.kl <= max_kl]
    if chosen is None:
        assert not within
    else:
        assert chosen.kl <= max_kl
        assert chosen.size_bytes == min(within)


def test_front_leaves_out_points_that_are_not_numbers() -> None:
    assert pareto_front(
        [TrialPoint("a", float("nan"), 1), TrialPoint("b", float("inf"), 1), TrialPoint("c", 1.0, 9)]
    ) == (TrialPoint("c", 1.0, 9),)


def test_preference_takes_the_safer_neighbor_before_the_bolder_one() -> None:
    front = tuple(
        TrialPoint(name, kl, size) for name, kl, size in [("a", 0.9, 1), ("b", 0.5, 2), ("c", 0.1, 3), ("d", 0.01, 4)]
    )
    assert [p.name for p in preference(front, 0.2)] == ["c", "d", "b", "a"]
    assert [p.name for p in preference(front, 0.001)] == ["d", "c", "b", "a"]
    assert preference((), 0.1) == ()


def test_preference_has_a_faithful_point_beside_the_smallest_that_will_do() -> None:
    kls = {"int3": 0.11, "mxfp4": 0.045, "g128": 0.03, "g32": 0.018, "fp8": 0.002, "int8": 0.0002}
    front = tuple(TrialPoint(name, kl, size) for size, (name, kl) in enumerate(kls.items()))
    assert [p.name for p in preference(front, 0.05)] == ["mxfp4", "fp8", "g128", "int3", "g32", "int8"]


ORDER = [TrialPoint("a", 0.1, 1), TrialPoint("b", 0.05, 2), TrialPoint("c", 0.01, 3)]


def test_verify_takes_the_next_point_where_one_does_not_hold() -> None:
    asked: list[list[str]] = []

    def reload(names):
        asked.append(list(names))
        return {"a": 0.3, "b": 0.0501, "c": 0.01}

    verdict = verify(ORDER, wanted=2, tolerance=1e-3, noise=0.0, reload=reload)
    assert verdict.accepted == {"b": 0.0501, "c": 0.01}
    assert "was 0.100000" in verdict.rejected["a"]
    assert asked == [["a", "b"], ["c"]]


@pytest.mark.parametrize(
    ("again", "reason"),
    [("no such file", "no such file"), (float("nan"), "nan"), (0.1 + 2e-3, "0.102")],
    ids=["error", "nan", "far"],
)
def test_verify_rejects_with_the_reason(again: float | str, reason: str) -> None:
    verdict = verify(ORDER[:1], wanted=1, tolerance=1e-3, noise=0.0, reload=lambda names: {"a": again})
    assert not verdict.accepted
    assert reason in verdict.rejected["a"]


def test_verify_with_enough_accepted_reloads_no_more() -> None:
    verdict = verify(ORDER, wanted=1, tolerance=1e-3, noise=0.0, reload=lambda names: {name: 0.1 for name in names})
    assert list(verdict.accepted) == ["a"]
    assert not verdict.rejected


def test_finalists_and_the_chosen_one_are_never_beaten_by_the_cast() -> None:
    """The figures of a champion that a cast of the rest beat: int8 layers beside 16-bit embeddings."""
    points = [TrialPoint("16bit", 1e-7, 1_100_000), TrialPoint("int3", 3.4e-4, 1_228_520)]
    assert [point.name for point in preference(pareto_front(points), 0.05)] == ["16bit"]
    points.append(TrialPoint("int8", 5.7e-6, 923_904))
    assert [point.name for point in preference(pareto_front(points), 0.05)] == ["int8", "16bit"]


@given(POINTS, st.floats(0.01, 2))
def test_no_finalist_is_beaten_by_any_trial(points: list[TrialPoint], max_kl: float) -> None:
    order = preference(pareto_front(points), max_kl)
    assert not any(beats(other, one) for one in order for other in points)
    chosen = choose(order, max_kl)
    assert chosen is None or not any(beats(other, chosen) for other in points)


def test_verify_in_bfloat16_accepts_what_another_micro_batch_rounds_otherwise() -> None:
    """0.0286 in the trial and 0.0323 behind a smaller micro-batch were seen; a broken checkpoint is far off."""
    point, noise = TrialPoint("a", 0.0286, 1), 1e-3
    found = {"near": 0.0323, "broken": 0.0286 + 0.02}
    verdicts = {
        name: verify([point], wanted=1, tolerance=1e-3, noise=noise, reload=lambda _, kl=kl: {"a": kl})
        for name, kl in found.items()
    }
    assert verdicts["near"].accepted == {"a": 0.0323}
    assert not verdicts["broken"].accepted
    assert not verify([point], wanted=1, tolerance=1e-3, noise=1e-10, reload=lambda _: {"a": 0.0323}).accepted


def test_rounding_of_a_kl_is_that_of_distances_whose_squares_are_kls() -> None:
    """KLs of Gaussians with one variance are half squared distances exactly: of means 0.2 and 0.3 apart, 0.5 at most."""
    half = lambda distance: distance**2 / 2  # noqa: E731
    assert half(0.2) + rounding(half(0.2), half(0.3)) == pytest.approx(half(0.5))
