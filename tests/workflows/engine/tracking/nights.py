"""A night's records, as a driver would tell them, for the tests of the ledger."""

from collections.abc import Sequence
from pathlib import Path

from workflows.engine.events import (
    CandidateFound,
    CurvePoints,
    RunClosed,
    RunEvent,
    RunOpened,
    StepClosed,
    StepOpened,
    VerdictReached,
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


def opened(run: str, at_ms: int = 1000) -> RunOpened:
    tags = {"commit": "abc123", "command": "stillhouse run quickstart", "store": "/store"}
    return RunOpened(run, "quickstart", EXPERIMENT, at_ms, {"temperature": "2.0"}, tags)


def step(run: str, name: str, stage: str, at_ms: int, *, hit: bool = False) -> list[RunEvent]:
    attempt = 0 if hit else 1
    begin = StepOpened(run, name, attempt, at_ms, stage, "f" * 64, "hit" if hit else "miss")
    points = CurvePoints(run, name, attempt, tuple(("train/loss", 5.0 - k, k, at_ms + k) for k in range(3)))
    tags = {"made_by_run": "an-earlier-run"} if hit else {}
    end = StepClosed(run, name, attempt, at_ms + 90, "FINISHED", {"seconds": 0.09}, {"seed": "0"}, tags, '{"seed": 0}')
    return [begin, *([] if hit else [points]), end]


def candidate(run: str, name: str, at_ms: int, scores: str = SCORES) -> CandidateFound:
    metrics = {"final/kl_to_teacher": KL[name], "final/size_bytes": 1e6, "final/latency_p50_ms": 3.5}
    fingerprint = f"{list(KL).index(name)}" * 64
    uri = f"/store/artifacts/{fingerprint}/out/1/model"
    return CandidateFound(run, scores, name, at_ms, uri, {"method": "none"}, metrics, {"fingerprint": fingerprint})


def verdict(run: str, champion: str | None, at_ms: int, scores: str = SCORES) -> VerdictReached:
    return VerdictReached(run, scores, "llama-6l", champion, at_ms, ("kl_to_teacher is below 0.25 nats",))


def night(
    run: str,
    at_ms: int = 1000,
    *,
    champion: str | None = "student-w8a8",
    steps: int = 5,
    candidates: Sequence[str] = tuple(KL),
    files: tuple[Path, ...] = (),
) -> list[RunEvent]:
    """Return the records of one whole run."""
    records: list[RunEvent] = [opened(run, at_ms)]
    for index, (name, stage) in enumerate(STEPS[:steps]):
        records += step(run, name, stage, at_ms + 100 * (index + 1), hit=index == 0)
    records += [candidate(run, name, at_ms + 1000) for name in candidates]
    records.append(verdict(run, champion, at_ms + 1001))
    records.append(RunClosed(run, at_ms + 1002, "FINISHED", "**finished**: all is well", tuple(str(f) for f in files)))
    return records


def short_night() -> list[RunEvent]:
    return night("r", steps=2, candidates=["student-w8a8"])
