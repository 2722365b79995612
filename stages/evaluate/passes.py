"""Which models are scored in which order, against what: each model once, after those that it is compared with.

Everything is compared with the reference (the teacher), and a quantized model also with the model that was quantized.
The reference is scored first; it and each base keep their distributions for those that come after them.

Does not: run anything.
"""

from dataclasses import dataclass

from stages.candidates import Candidate
from stages.contract import Artifact
from stages.errors import StageFailed, nearest

__all__ = ["REFERENCE", "Pass", "plan_passes"]

REFERENCE = "@reference"
"""Name of the reference's rows in `documents.parquet` where it is not among the models; no step can be named so."""


@dataclass(frozen=True, slots=True)
class Pass:
    """One model over all rows."""

    candidate: Candidate
    against: tuple[str, ...]
    """Names of the models that it is compared with; they must be done before."""
    keep: bool
    """Whether others are compared with it."""


def plan_passes(candidates: list[Candidate], reference: Artifact) -> list[Pass]:
    """Return one pass for each model, each after those that it depends on; the first is the reference's."""
    same = [c for c in candidates if c.kind == "model" and c.artifact.fingerprint == reference.fingerprint]
    teacher = same[0] if same else Candidate(REFERENCE, reference, "model")
    if not same and not reference.below("model/config.json"):
        raise StageFailed(f"the reference {reference.fingerprint[:12]} has no model/config.json; expected a checkpoint")
    bases = {candidate.base for candidate in candidates if candidate.base is not None}
    unknown = sorted(bases - {candidate.name for candidate in candidates})
    if unknown:
        raise StageFailed(f"unknown base {unknown[0]!r}{nearest(unknown[0], [c.name for c in candidates])}")
    passes = [Pass(teacher, (), keep=True)]
    for candidate in sorted(candidates, key=lambda c: (c.kind == "quantized", c.name not in bases)):
        if candidate.name != teacher.name:
            against = (teacher.name, *([candidate.base] if candidate.base else []))
            passes.append(Pass(candidate, tuple(dict.fromkeys(against)), keep=candidate.name in bases))
    return passes
