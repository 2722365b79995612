"""The table's order and cells, and the Pareto line of the figure."""

from stages.formats.report import Check, Report, ReportedCandidate, Verdict
from stages.promote.figure import find_pareto
from stages.promote.leaderboard import leaderboard


def candidate(name: str, size_mb: float, kl: float, **metrics: float) -> ReportedCandidate:
    return ReportedCandidate(
        name=name,
        fingerprint=name,
        folder="model",
        uri=name,
        kind="model",
        base=None,
        params={},
        metrics={"final/size_bytes": size_mb * 1e6, "final/kl_to_teacher": kl, **metrics},
        intervals={},
        notes={},
    )


def report(*candidates: ReportedCandidate, champion: str | None, kept: dict[str, list[bool]]) -> Report:
    checks = {
        name: tuple(
            Check(limit="max_size_bytes", bound=1, value=1, interval=None, passed=passed, text="") for passed in values
        )
        for name, values in kept.items()
    }
    verdict = Verdict(
        outcome="accepted",
        champion=champion,
        registered_name="house",
        reasons=(),
        claims=(),
        checks=checks,
        beaten_by={},
        warnings=(),
    )
    return Report(
        verdict=verdict,
        reference="teacher",
        split="validation",
        tokens=1,
        documents=1,
        effective_documents=1,
        dtype="float32",
        minimum_detectable_nats=0.1,
        references=(),
        candidates=candidates,
    )


def test_leaderboard_begins_with_the_champion_and_ends_with_the_teacher():
    headers, rows = leaderboard(
        report(
            candidate("teacher", 13.1, 0.0),
            candidate("far", 1, 2.0),
            candidate("near", 2, 1.0),
            candidate("big", 8, 0.2),
            candidate("small", 3, 0.25),
            candidate("best", 2.5, 0.3),
            champion="best",
            kept={"far": [False], "near": [True, False], "big": [True], "small": [True], "best": [True]},
        )
    )
    assert headers == ["candidate", "size MB", "KL to teacher", "limits kept"]
    assert [row[0] for row in rows] == ["best ★", "small", "big", "near", "far", "teacher"]
    assert rows[0] == ["best ★", "2.50", "0.3000", "1 of 1"]
    assert [row[-1] for row in rows[3:]] == ["1 of 2", "0 of 1", "teacher"]


def test_leaderboard_shows_a_dash_for_what_one_candidate_lacks():
    headers, rows = leaderboard(
        report(
            candidate("a", 4, 0.1, **{"final/latency_p50_ms": 2.345}),
            candidate("a.w4", 1, 0.2),
            champion=None,
            kept={"a": [True], "a.w4": [False]},
        )
    )
    column = headers.index("ms/token p50")
    assert [row[column] for row in rows] == ["2.35", "–"]


def test_leaderboard_of_large_models_writes_whole_megabytes():
    _, rows = leaderboard(report(candidate("big", 15_234.5, 0.1), champion=None, kept={"big": [True]}))
    assert rows[0][1] == "15,234"


def test_pareto_line_leaves_out_what_another_beats_in_both():
    assert find_pareto([(4, 0.1), (1, 0.5), (2, 0.6), (3, 0.1), (0.5, 2.0)]) == [4, 1, 3]
    assert find_pareto([]) == []
