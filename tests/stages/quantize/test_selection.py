"""The front, the finalists' order, the choice and the reload's verdict: pure functions."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.quantize.selection import TrialPoint, choose, pareto_front, preference, verify

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


ORDER = [TrialPoint("a", 0.1, 1), TrialPoint("b", 0.05, 2), TrialPoint("c", 0.01, 3)]


def test_verify_takes_the_next_point_where_one_does_not_hold() -> None:
    asked: list[list[str]] = []

    def reload(names):
        asked.append(list(names))
        return {"a": 0.3, "b": 0.0501, "c": 0.01}

    verdict = verify(ORDER, wanted=2, tolerance=1e-3, reload=reload)
    assert verdict.accepted == {"b": 0.0501, "c": 0.01}
    assert "was 0.100000" in verdict.rejected["a"]
    assert asked == [["a", "b"], ["c"]]


@pytest.mark.parametrize(
    ("again", "reason"),
    [("no such file", "no such file"), (float("nan"), "nan"), (0.1 + 2e-3, "0.102")],
    ids=["error", "nan", "far"],
)
def test_verify_rejects_with_the_reason(again: float | str, reason: str) -> None:
    verdict = verify(ORDER[:1], wanted=1, tolerance=1e-3, reload=lambda names: {"a": again})
    assert not verdict.accepted
    assert reason in verdict.rejected["a"]


def test_verify_with_enough_accepted_reloads_no_more() -> None:
    verdict = verify(ORDER, wanted=1, tolerance=1e-3, reload=lambda names: {name: 0.1 for name in names})
    assert list(verdict.accepted) == ["a"]
    assert not verdict.rejected
