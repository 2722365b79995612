"""What a commit's manifest says: the files, what they were made from and by, and what that took."""

import time
from collections.abc import Mapping
from typing import Any

from stages.contract import Resources
from workflows.engine.executor import AttemptResult
from workflows.engine.identity import Fingerprint
from workflows.engine.plan import StepPlan
from workflows.engine.provenance import code_evidence
from workflows.engine.store import MANIFEST_SCHEMA, ArtifactStore, Claim


def build_manifest(
    planned: StepPlan,
    claim: Claim,
    done: AttemptResult,
    *,
    workflow: str,
    run: str,
    inputs: Mapping[str, Mapping[str, Any]],
    resources: Resources,
) -> dict[str, Any]:
    """Return the manifest of an attempt that ended well, as plain JSON."""
    assert planned.identity is not None
    stage = planned.step.stage
    return {
        "schema": MANIFEST_SCHEMA,
        "fingerprint": claim.fingerprint,
        "generation": claim.generation,
        "epoch": claim.epoch,
        "kind": stage.KIND,
        "stage": type(stage).__name__,
        "step": planned.step.name,
        "workflow": workflow,
        "run": run,
        "files": done.files,
        "metrics": dict(done.metrics),
        "fallbacks": list(done.fallbacks),
        "identity": planned.identity.record,
        "inputs": inputs,
        "resources": resources.model_dump(),
        "provenance": {**done.environment, **code_evidence(type(stage))},
        "seconds": done.seconds,
        "peak_memory_bytes": done.peak_memory_bytes,
        "created": time.time(),
    }


def cost_seconds(store: ArtifactStore, fingerprint: Fingerprint) -> float:
    """Return the wall-clock seconds of all the steps that an artifact was made by, each counted once."""
    seconds = 0.0
    seen: set[str] = set()
    todo: list[str] = [fingerprint]
    while todo:
        current = Fingerprint(todo.pop())
        if current in seen:
            continue
        seen.add(current)
        commit = store.newest(current)
        if commit is not None:
            seconds += commit.seconds
            todo += [part["fingerprint"] for part in commit.manifest["inputs"].values()]
    return seconds
