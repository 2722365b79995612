"""A night's events, as a driver would record them, for the tests of tracking."""

from collections.abc import Sequence
from pathlib import Path

from stages.formats.report import Report, ReportedCandidate, Verdict
from workflows.engine.events import (
    AttemptEnded,
    AttemptStarted,
    CurvePoints,
    ReportMade,
    RunEnded,
    RunEvent,
    RunStarted,
)

EXPERIMENT = "quickstart/llama-6l"
SCORES = "5" * 64
STEPS = (
    ("corpus", "Prepare"),
    ("teacher", "Train"),
    ("signals", "Teach"),
    ("train.small", "Train"),
    ("quantize", "Quantize"),
)
KL = {"teacher": 0.0, "student": 0.21, "student-w8a8": 0.22, "student-w4a16": 0.29}


def started(run: str, at_ms: int = 1000, experiment: str = EXPERIMENT) -> RunStarted:
    return RunStarted(
        run=run,
        workflow="quickstart",
        experiment=experiment,
        at_ms=at_ms,
        params={"temperature": "2.0"},
        command="stillhouse run quickstart",
        commit="abc123",
        user="me",
        store="/store",
    )


def step(name: str, stage: str, at_ms: int, *, hit: bool = False) -> list[RunEvent]:
    attempt = 0 if hit else 1
    begin = AttemptStarted(
        step=name,
        attempt=attempt,
        at_ms=at_ms,
        stage=stage,
        fingerprint="f" * 64,
        cache="hit" if hit else "miss",
        config={"seed": 0},
    )
    points = tuple(("train/loss", 5.0 - k, k, at_ms + k) for k in range(3))
    curves: list[RunEvent] = [] if hit else [CurvePoints(step=name, attempt=attempt, at_ms=at_ms + 2, points=points)]
    tags = {"made_by_run": "an-earlier-run"} if hit else {}
    return [begin, *curves, ended(name, attempt, at_ms + 90, metrics={"seconds": 0.09}, tags=tags)]


def ended(name: str, attempt: int, at_ms: int, status: str = "FINISHED", **fields: object) -> AttemptEnded:
    values = {"step": name, "attempt": attempt, "at_ms": at_ms, "status": status, "metrics": {}, "tags": {}, **fields}
    return AttemptEnded.model_validate(values)


def candidate(name: str, latency_p50_ms: float = 3.5) -> ReportedCandidate:
    fingerprint = f"{list(KL).index(name)}" * 64
    metrics = {"final/kl_to_teacher": KL[name], "final/size_bytes": 1e6, "final/latency_p50_ms": latency_p50_ms}
    return ReportedCandidate(
        name=name, fingerprint=fingerprint, folder="model", uri=f"/store/artifacts/{fingerprint}/out/1/model",
        kind="distilled", base=None, params={"method": "none"}, metrics=metrics, intervals={}, notes={},
    )  # fmt: skip


def judged(*candidates: ReportedCandidate, at_ms: int, champion: str | None = None, scores: str = SCORES) -> ReportMade:
    """Return the report on some candidates."""
    reasons = ("kl_to_teacher is below 0.25 nats",)
    verdict = Verdict(
        outcome="accepted" if champion else "rejected", champion=champion, registered_name="llama-6l",
        reasons=reasons, claims=(), checks={},
    )  # fmt: skip
    report = Report(
        verdict=verdict, reference=None, split="validation", tokens=10, documents=1, effective_documents=1.0,
        dtype="float32", minimum_detectable_nats=0.1, candidates=candidates,
    )  # fmt: skip
    return ReportMade(at_ms=at_ms, scores=scores, made_by_run="r", report=report)


def night(
    run: str,
    at_ms: int = 1000,
    *,
    champion: str | None = "student-w8a8",
    steps: int = 5,
    candidates: Sequence[str] = tuple(KL),
    files: tuple[Path, ...] = (),
    experiment: str = EXPERIMENT,
) -> list[RunEvent]:
    """Return the events of one whole run."""
    events: list[RunEvent] = [started(run, at_ms, experiment)]
    for index, (name, stage) in enumerate(STEPS[:steps]):
        events += step(name, stage, at_ms + 100 * (index + 1), hit=index == 0)
    events.append(judged(*map(candidate, candidates), at_ms=at_ms + 1000, champion=champion))
    note = "**finished**: all is well"
    return [*events, RunEnded(at_ms=at_ms + 1002, status="FINISHED", note=note, files=tuple(map(str, files)))]


def short_night() -> list[RunEvent]:
    return night("r", steps=2, candidates=["student-w8a8"])
