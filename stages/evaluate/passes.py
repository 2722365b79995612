"""Which models are scored in which order, against what: each model once, after those that it is compared with.

Everything is compared with the reference (the teacher), and a derived model also with its base. The reference is scored
first; it and each base keep their distributions for those that come after them.

Does not: run anything.
"""

from dataclasses import dataclass

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
    same = [c for c in candidates if c.base is None and c.artifact.fingerprint == reference.fingerprint]
    teacher = same[0] if same else Candidate(REFERENCE, reference, "model")
    if not same and not reference.below("model/config.json"):
        raise StageFailed(f"the reference {reference.fingerprint[:12]} has no model/config.json; expected a checkpoint")
    bases = {candidate.base for candidate in candidates if candidate.base is not None}
    passes = [Pass(teacher, (), keep=True)]
    for candidate in _in_order(candidates, bases):
        if candidate.name != teacher.name:
            against = (teacher.name, *([candidate.base] if candidate.base else []))
            passes.append(Pass(candidate, tuple(dict.fromkeys(against)), keep=candidate.name in bases))
    return passes


def _in_order(candidates: list[Candidate], bases: set[str]) -> list[Candidate]:
    """Return the candidates, each after its base; of those that may come next the bases first."""
    ordered: list[Candidate] = []
    left = sorted(candidates, key=lambda candidate: candidate.name not in bases)
    while left:
        placed = {None, *(candidate.name for candidate in ordered)}
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
