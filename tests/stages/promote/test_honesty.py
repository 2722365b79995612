"""What a verdict must not claim: without limits, by luck among many, of a method from one seed, of toys."""

import numpy as np
import pytest
from pydantic import ValidationError

from stages.formats.documents import read_documents
from stages.formats.report import Check, Report
from stages.formats.scores import Scores
from stages.formats.speed import Speed
from stages.promote import checks
from stages.promote.evidence import read_evidence
from stages.promote.leaderboard import write_markdown
from stages.promote.report import build_report
from stages.promote.stage import Gate, Method, Promote
from stages.promote.verdict import decide
from tests.stages.promote.made_up import TEACHER, Made, reference_scores, write_scores, write_speed
from tests.stages.promote.test_stage import MODELS, limits


def judge(folder, models=None, *, gate=None, speed=True, scored=None, baseline=None, contender=None) -> Report:
    """Return the report as the stage makes it, without its files."""
    models = MODELS if models is None else models
    scores = write_scores(folder / "scores", models, **(scored or {}))
    speeds = Speed.read(write_speed(folder / "speed", models)) if speed else None
    evidence = read_evidence(Scores.read(scores), read_documents(scores), speeds, num_resamples=2000, seed=0)
    sides = {
        key: None if side is None else Method.of(side)
        for key, side in (("baseline", baseline), ("contender", contender))
    }
    return build_report(
        evidence, decide(evidence, limits() if gate is None else gate, registered_name="house", **sides)
    )


def warning_of(report, start: str) -> str:
    (found,) = (warning for warning in report.verdict.warnings if warning.startswith(start))
    return found


# Limits ---------------------------------------------------------------------------------------------------------------


def test_gate_without_limits_judges_and_promotes_nothing(tmp_path):
    report = judge(tmp_path, gate=Gate())
    verdict = report.verdict
    assert (verdict.outcome, verdict.champion) == ("unjudged", None)
    assert verdict.reasons[0].startswith("unjudged: the gate has no limit")
    text = write_markdown(report)
    assert text.startswith("# house: unjudged")
    assert "no limits" in text
    assert "## Limits" not in text
    assert len(report.candidates) == len(MODELS)


def test_gate_has_no_default_limit():
    assert Gate().limits == {}
    assert Gate(max_size_bytes=5).limits == {"max_size_bytes": 5}


def test_gate_without_a_limit_on_quality_is_warned_of(tmp_path):
    report = judge(tmp_path, gate=Gate(max_size_bytes=2_000_000))
    assert report.verdict.champion == "distilled.w2a16"
    assert "however bad" in warning_of(report, "the gate has no limit on quality")


def test_limits_kept_by_luck_among_many_candidates_are_not_kept(tmp_path):
    """Alone it keeps its limit at 2.5 %; among five the smallest p-value must be below 0.5 %."""
    made = Made(0.1, kl=0.2, size_bytes=1_000_000)
    alone = judge(tmp_path / "alone", {"teacher": TEACHER, "a": made}, gate=Gate(max_kl_to_teacher=0.21))
    many = {"teacher": TEACHER, **{name: made for name in "abcde"}}
    (check,) = alone.verdict.checks["a"]
    bound = check.interval[1] + 2e-4
    report = judge(tmp_path / "one", {"teacher": TEACHER, "a": made}, gate=Gate(max_kl_to_teacher=bound))
    assert report.verdict.champion == "a"
    report = judge(tmp_path / "many", many, gate=Gate(max_kl_to_teacher=bound))
    assert report.verdict.outcome == "rejected"
    assert any("not shown for 5 candidates at once (Holm" in reason for reason in report.verdict.reasons)


def test_candidates_that_are_too_large_do_not_count_among_those_tried():
    def found(p_value: float, passed_size: bool) -> tuple[Check, ...]:
        size = Check(limit="max_size_bytes", bound=1, value=1, interval=None, passed=passed_size, text="")
        kl = Check(limit="max_kl_to_base", bound=1, value=1, interval=(0, 1), p_value=p_value, passed=True, text="")
        return size, kl

    assert checks.keeps_exact_limits(found(0.02, True))
    assert not checks.keeps_exact_limits(found(0.02, False))


def test_few_documents_keep_no_limit_of_quality(tmp_path):
    models = {"teacher": TEACHER, "a": Made(0.1, kl=0.2, size_bytes=1_000_000)}
    report = judge(tmp_path, models, gate=Gate(max_kl_to_teacher=9.0), speed=False, scored={"num_documents": 5})
    (check,) = report.verdict.checks["a"]
    assert not check.passed
    assert "which 5 documents cannot show" in check.text


def test_limit_below_the_noise_floor_is_warned_of(tmp_path):
    report = judge(tmp_path, gate=limits(max_kl_to_base=1e-3), scored={"noise_floor": reference_scores(9.0, 2e-3)})
    assert "score in float32" in warning_of(report, "max_kl_to_base=0.001 is below the noise floor")
    quiet = judge(tmp_path / "quiet", scored={"noise_floor": reference_scores(9.0, 2e-3)})
    assert not any("noise floor" in warning for warning in quiet.verdict.warnings)


# What another one beats -----------------------------------------------------------------------------------------------


def test_candidate_that_another_beats_in_size_and_kl_is_not_promoted(tmp_path):
    """The better one fails a limit to its base, so the beaten one is the smallest that keeps all of them."""
    models = {
        "teacher": TEACHER,
        "small": Made(0.10, kl=0.30, size_bytes=2_000_000),
        "cast": Made(0.05, kl=0.05, size_bytes=1_000_000, base="teacher", kl_to_base=0.5),
        "other": Made(0.10, kl=0.01, size_bytes=3_000_000),
    }
    report = judge(tmp_path, models)
    assert report.verdict.beaten_by == {"small": "cast"}
    assert report.verdict.champion == "other"
    expected = "small is out: cast is both smaller (1,000,000 bytes) and closer to the teacher (KL 0.0"
    assert any(reason.startswith(expected) for reason in report.verdict.reasons)
    assert "| beaten |" in write_markdown(report)


def test_candidate_that_the_teacher_beats_is_not_promoted(tmp_path):
    models = {"teacher": TEACHER, "huge": Made(0.01, kl=0.01, size_bytes=20_000_000)}
    report = judge(tmp_path, models, gate=Gate(max_kl_to_teacher=1.0))
    assert report.verdict.beaten_by == {"huge": "teacher"}
    assert report.verdict.outcome == "rejected"


def test_candidate_is_not_beaten_by_one_that_the_gate_finds_too_slow(tmp_path):
    models = {
        "teacher": TEACHER,
        "fits": Made(0.1, kl=0.2, size_bytes=2_000_000),
        "unmeasured": Made(0.1, kl=0.1, size_bytes=1_000_000, base="teacher"),
    }
    report = judge(tmp_path, models, gate=limits(max_latency_p50_ms=3.0))
    assert report.verdict.beaten_by == {}
    assert report.verdict.champion == "fits"


# Claims ---------------------------------------------------------------------------------------------------------------

SEEDS = {f"plain{s}": Made(0.20 + offset, kl=0.3) for s, offset in enumerate((0.0, 0.02, -0.02))} | {
    f"distilled{s}": Made(0.10 + offset, kl=0.2) for s, offset in enumerate((0.0, 0.01, -0.02))
}


def method(name: str, num_seeds: int) -> Method:
    return Method(name=name, models=tuple(f"{name}{s}" for s in range(num_seeds)))


def test_claim_between_equally_good_models_does_not_hold(tmp_path):
    models = {"teacher": TEACHER, "a": Made(0.1), "b": Made(0.1)}
    reports = [
        judge(tmp_path / str(seed), models, speed=False, scored={"seed": seed}, baseline="a", contender="b")
        for seed in range(8)
    ]
    claims = [report.verdict.claims[0] for report in reports]
    assert sum(claim.holds for claim in claims) <= 1  # 2.5 % each
    assert any("does not beat, beyond noise, a" in claim.text for claim in claims)


def test_claim_over_three_seeds_a_side_is_about_the_method(tmp_path):
    sides = {"baseline": method("plain", 3), "contender": method("distilled", 3)}
    report = judge(tmp_path, {"teacher": TEACHER, **SEEDS}, speed=False, **sides)
    (claim,) = report.verdict.claims
    assert (claim.about, claim.holds) == ("method", True)
    assert claim.text.startswith("the method distilled beats plain on held-out text")
    assert "over 3 training seeds a side and 120 documents" in claim.text
    assert "nothing of the method" not in claim.text
    assert claim.models["plain"] == ("plain0", "plain1", "plain2")
    assert claim.difference_nats_per_token == pytest.approx(0.1, abs=0.03)
    assert 0 < claim.minimum_detectable_nats < 0.2


def test_claim_over_two_seeds_a_side_says_nothing_of_the_method(tmp_path):
    sides = {"baseline": method("plain", 2), "contender": method("distilled", 2)}
    report = judge(tmp_path, {"teacher": TEACHER, **SEEDS}, speed=False, **sides)
    (claim,) = report.verdict.claims
    assert claim.about == "checkpoint"
    assert claim.text.startswith("these checkpoints of distilled beats")
    assert claim.text.endswith("It says nothing of the method: that takes 3 training seeds a side")


def test_claim_does_not_hold_where_seeds_differ_more_than_methods(tmp_path):
    models = {"teacher": TEACHER}
    models |= {f"plain{s}": Made(0.2 + offset, kl=0.3) for s, offset in enumerate((0.0, 0.3, -0.25))}
    models |= {f"distilled{s}": Made(0.1 + offset, kl=0.2) for s, offset in enumerate((0.1, -0.1, 0.2))}
    sides = {"baseline": method("plain", 3), "contender": method("distilled", 3)}
    report = judge(tmp_path / "three", models, speed=False, **sides)
    assert not report.verdict.claims[0].holds
    alone = judge(tmp_path / "one", models, speed=False, baseline="plain1", contender="distilled1")
    assert alone.verdict.claims[0].holds


@pytest.mark.parametrize(
    "config",
    [
        {"baseline": {"name": "a", "models": ["x", "x"]}, "contender": "b"},
        {"baseline": {"name": "a", "models": []}, "contender": "b"},
        {"baseline": {"name": "a", "models": ["x", "y"]}, "contender": {"name": "b", "models": ["y", "z"]}},
    ],
    ids=["one model twice", "no model", "a model on both sides"],
)
def test_methods_that_make_no_sense_are_refused(config):
    with pytest.raises(ValidationError):
        Promote(registered_name="house", **config)


# Warnings and rows for reference ----------------------------------------------------------------------------------


def test_models_that_lose_to_counting_words_are_called_toys(tmp_path):
    report = judge(tmp_path)
    perplexity = {candidate.name: candidate.metrics["final/perplexity"] for candidate in report.candidates}
    between = float(np.sqrt(perplexity["plain"] * perplexity["distilled.w2a16"]))
    scored = {"bigram": reference_scores(between), "trigram": reference_scores(perplexity["teacher"] * 1.001)}
    report = judge(tmp_path / "toys", scored=scored)
    first, second = (warning for warning in report.verdict.warnings if warning.startswith("toys: "))
    assert "a Kneser-Ney bigram of the same training tokens" in first
    assert "distilled.w2a16" in first
    assert "plain" in second
    assert "distilled.w2a16" not in second
    assert "the teacher" not in second
    assert f"- **Warning**: {first}" in write_markdown(report)


def test_teacher_that_is_no_better_than_its_student_is_called_too_weak(tmp_path):
    models = {**MODELS, "plain": Made(excess=-0.1, kl=0.4)}
    report = judge(tmp_path, models)
    warning = warning_of(report, "teacher too weak")
    assert "plain (" in warning
    assert "distilled" not in warning


def test_few_documents_are_warned_of_by_what_they_are_worth(tmp_path):
    report = judge(tmp_path, scored={"num_documents": 20})
    assert "the 20 that were scored are worth" in warning_of(report, "few documents")
    enough = judge(tmp_path / "enough")
    assert enough.verdict.warnings == ()


def test_rows_for_reference_stand_below_the_teacher_and_are_no_candidates(tmp_path):
    scored = {"trigram": reference_scores(90.0), "noise_floor": reference_scores(9.0, 1e-4)}
    report = judge(tmp_path, scored=scored)
    assert [row.name for row in report.references] == ["trigram", "teacher again"]
    lines = [line for line in write_markdown(report).splitlines() if line.startswith("| ")]
    assert lines[-3].startswith("| teacher |")
    assert lines[-2].startswith("| (trigram) | – |")
    assert lines[-2].endswith("| reference |")
    assert "| 0.0001 |" in lines[-1]
    assert "trigram" not in report.verdict.checks
