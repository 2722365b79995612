"""Which models are scored in which order, against what: each model once, after those that it is compared with.

Everything is compared with the reference (the teacher), and a derived model also with its base, which may be the
reference itself, be it among the models or not. The reference is scored first, hence against nothing, whatever it was
derived from itself; it and each base keep their distributions for those that come after them.

Does not: run anything.
"""

from dataclasses import dataclass, replace

from stages.candidates import Candidate
from stages.contract import Artifact
from stages.errors import StageFailed
from stages.formats.scores import REFERENCE

__all__ = ["Pass", "plan_passes"]


@dataclass(frozen=True, slots=True)
class Pass:
    """One model over all rows."""

    candidate: Candidate
    against: tuple[str, ...]
    """Names of the models that it is compared with; they must be done before."""
    keep: bool
    """Whether others are compared with it."""


def plan_passes(candidates: list[Candidate], reference: Artifact) -> list[Pass]:
    """Return one pass for each model, each after those that it depends on; the first is the reference's.

    Raises:
        StageFailed: the reference is no checkpoint, or models are each other's bases.
    """
    key = (reference.fingerprint, "model")
    same = [candidate for candidate in candidates if (candidate.artifact.fingerprint, candidate.folder) == key]
    if not same and not reference.below("model/config.json"):
        raise StageFailed(f"the reference {reference.fingerprint[:12]} has no model/config.json; expected a checkpoint")
    teacher = replace(same[0], base=None) if same else Candidate(REFERENCE, reference, "model")
    others = [_with_base(candidate, teacher) for candidate in candidates if candidate.name != teacher.name]
    bases = {candidate.base for candidate in others if candidate.base is not None}
    passes = [Pass(teacher, (), keep=True)]
    for candidate in _in_order(others, teacher, bases):
        against = (teacher.name, *([candidate.base] if candidate.base else []))
        passes.append(Pass(candidate, tuple(dict.fromkeys(against)), keep=candidate.name in bases))
    return passes


def _with_base(candidate: Candidate, teacher: Candidate) -> Candidate:
    """Return a candidate with the reference as its base, where it was derived from that and it is no candidate."""
    if candidate.base is None and candidate.base_fingerprint == teacher.artifact.fingerprint:
        return replace(candidate, base=teacher.name)
    return candidate


def _in_order(candidates: list[Candidate], teacher: Candidate, bases: set[str]) -> list[Candidate]:
    """Return the candidates, each after its base; of those that may come next the bases first."""
    ordered: list[Candidate] = []
    left = sorted(candidates, key=lambda candidate: candidate.name not in bases)
    while left:
        placed = {None, teacher.name, *(candidate.name for candidate in ordered)}
        ready = [candidate for candidate in left if candidate.base in placed]
        if not ready:
            raise StageFailed(
                f"the bases of {', '.join(candidate.name for candidate in left)} cannot be put in order: "
                f"{', '.join(f'{c.name} is derived from {c.base}' for c in left)}; expected bases that are models of "
                "this step and no circle of them"
            )
        ordered += ready
        left = [candidate for candidate in left if candidate not in ready]
    return ordered
