"""A step's data from outside as it was planned: pinned before an attempt, and looked at again before its commit.

Promises: what is committed under a fingerprint was made from the data that the fingerprint names; data that moved since
is an error of the step, never a wrong result that is found again for ever.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from stages.contract import Artifact, Stage
from stages.errors import OutsideError, StageFailed
from workflows.engine.graph import Given
from workflows.engine.identity import given_identity, step_identity
from workflows.engine.plan import StepPlan


@dataclass(frozen=True, slots=True)
class Pinned:
    """A step with hub ids at their commit and absolute paths."""

    planned: StepPlan
    stage: Stage
    givens: Mapping[str, Given]
    """Input → the checkpoint from outside, pinned."""

    def artifact(self, given: Given) -> Artifact:
        """Return a checkpoint from outside as an artifact.

        Raises:
            OutsideError: it is out of reach.
        """
        pinned = next(known for known in self.givens.values() if known.name == given.name)
        return pinned.checkpoint.artifact(given_identity(pinned).fingerprint)

    def moved(self) -> str | None:
        """Say what is no longer as planned, or None; of what is out of reach nothing is known, so nothing is said."""
        try:
            return self._difference()
        except OutsideError:
            return None

    def _difference(self) -> str | None:
        assert self.planned.identity is not None
        inputs = self.planned.identity.record["inputs"]
        for name, given in self.givens.items():
            if given_identity(given).fingerprint != inputs[name]:
                return _told(f"the checkpoint {given.checkpoint.source!r}")
        step = replace(self.planned.step, stage=self.stage)
        if step_identity(step, inputs).fingerprint != self.planned.fingerprint:
            return _told("its data from outside")
        return None


def pin(planned: StepPlan) -> Pinned:
    """Return a planned step with its data from outside pinned.

    Raises:
        OutsideError: the data is out of reach.
        StageFailed: it is no longer what was planned.
    """
    givens = {
        name: replace(source, checkpoint=source.checkpoint.resolved())
        for name, source in planned.step.sources()
        if isinstance(source, Given)
    }
    pinned = Pinned(planned, planned.step.stage.resolved(), givens)
    if moved := pinned._difference():
        raise StageFailed(moved)
    return pinned


def _told(what: str) -> str:
    return f"{what} has changed since this run was planned; run the same command again to plan with what is there now"
