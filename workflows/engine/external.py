"""A step's data from outside as it was planned: resolved when the run starts, compared before an attempt
and its commit.

Promises: what is committed under a fingerprint was made from the data that the fingerprint names; data that changed
since is an error of the step, never a wrong result that is found again for ever. A hub id stays at the commit that was
planned, whatever its branch does meanwhile.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

from stages.contract import Artifact, Stage
from stages.errors import StageFailed
from workflows.engine.graph import ExternalHandle
from workflows.engine.identity import external_identity, step_identity
from workflows.engine.plan import StepPlan

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ResolvedStep:
    """A step with hub ids at their commit and absolute paths."""

    planned: StepPlan
    stage: Stage
    externals: Mapping[ExternalHandle, ExternalHandle]
    """A checkpoint from outside, as the step names it and resolved."""

    def artifact(self, external: ExternalHandle) -> Artifact:
        """Return a checkpoint from outside as an artifact.

        Raises:
            ExternalDataError: it is out of reach.
        """
        name = next(name for name, source in self.planned.step.sources() if source == external)
        return self.externals[external].checkpoint.artifact(self.planned.known.inputs[name])

    def changed(self) -> str | None:
        """Say what is no longer as planned, or None; of what is out of reach nothing is known, so nothing is said."""
        try:
            return self.difference(hub=False)
        except Exception as error:  # noqa: BLE001  a finished attempt must not be lost over data that went away since
            logger.warning("cannot look at the data from outside of %s: %s", self.planned.step.name, error)
            return None

    def difference(self, *, hub: bool) -> str | None:
        """Say what is not as planned, or None; checkpoints at a commit of the hub, which never changes, on demand.

        Raises:
            ExternalDataError: the data is out of reach.
        """
        for name, source in self.planned.step.sources():
            external = self.externals[source] if isinstance(source, ExternalHandle) else None
            if external is None or (external.checkpoint.revision is not None and not hub):
                continue
            if external_identity(external).fingerprint != self.planned.known.inputs[name]:
                return _changed(f"the checkpoint {external.checkpoint.source!r}")
        step = replace(self.planned.step, stage=self.stage)
        if step_identity(step, self.planned.known.inputs).fingerprint != self.planned.fingerprint:
            return _changed("its data from outside")
        return None


class ResolvedSteps:
    """The resolved steps of a run."""

    def __init__(self) -> None:
        """Begin with none."""
        self._steps: dict[str, ResolvedStep] = {}
        self._resolve = cache(lambda external: replace(external, checkpoint=external.checkpoint.resolved()))

    def of(self, planned: StepPlan) -> ResolvedStep:
        """Return a planned step with its data from outside resolved, the first time that it can be.

        Raises:
            ExternalDataError: the data is out of reach.
            StageFailed: it is no longer what was planned.
        """
        name = planned.step.name
        if name not in self._steps:
            sources = (source for _, source in planned.step.sources() if isinstance(source, ExternalHandle))
            externals = {source: self._resolve(source) for source in sources}
            resolved = ResolvedStep(planned, planned.step.stage.resolved(), externals)
            if changed := resolved.difference(hub=True):
                raise StageFailed(changed)
            self._steps[name] = resolved
        return self._steps[name]


def _changed(what: str) -> str:
    return f"{what} has changed since this run was planned; run the same command again to plan with what is there now"
