"""Whether the runtime that a gate names serves a candidate: what was measured in it counts before any rule."""

from stages.formats.report import Check
from stages.formats.scores import CandidateScores
from stages.formats.speed import CandidateSpeed
from stages.models.serving import Runtime, RuntimeChoice, Served, served_by, worst_of

__all__ = ["answers_about", "check_runtime"]


def answers_about(scores: CandidateScores, speed: CandidateSpeed) -> dict[Runtime, Served]:
    """Return who serves a candidate: by rule, and of the runtime that tried it what it did."""
    answers = served_by(scores.config)
    for runtime in answers:
        if speed.runtime == runtime and speed.served is not None:
            answers[runtime] = _measured(speed)
    return answers


def _measured(speed: CandidateSpeed) -> Served:
    if not speed.served:
        return Served("refused", speed.reason or "for no reason that it gave", "measured", seen=True)
    if speed.same_text is None:
        return Served("served", "it generates", "measured", seen=True)
    text = f"it writes {speed.same_text.text}"
    return Served("served" if speed.same_text.holds else "refused", text, "measured", seen=True)


def check_runtime(runtime: RuntimeChoice, scores: CandidateScores, speed: CandidateSpeed) -> Check:
    """Return the check that a runtime serves a candidate; it passes only where that is shown.

    Args:
        runtime: as the gate names it; `vllm` is the device that was measured, and both where none was.
        scores: has the checkpoint's config.
        speed: says what the runtime itself did, where it was measured.
    """
    answers = answers_about(scores, speed)
    names: tuple[Runtime, ...] = ("vllm-cpu", "vllm-cuda") if runtime == "vllm" else (runtime,)
    tried = [name for name in names if speed.runtime == name and speed.served is not None]
    found = worst_of(answers[name] for name in tried or names)
    name = next(name for name in tried or names if answers[name] is found)
    text = f"{name}: {found.text}"
    if found.answer == "unknown":
        text += "; it is not shown to be served: measure it there"
    passed = found.answer == "served"
    return Check(limit="runtime", bound=1.0, value=float(passed), interval=None, passed=passed, text=text)
