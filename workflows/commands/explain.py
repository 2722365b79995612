"""`stillhouse explain`: what a step's fingerprint is made of, and what differs from its result in another run."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from stages.errors import ConfigError, nearest
from workflows.commands.find import FoundWorkflow, find_run, find_workflow
from workflows.commands.options import ExplainOptions, Tokens, Workflow
from workflows.commands.output import print_fields
from workflows.commands.parameters import with_parameters
from workflows.engine.check import check, find_step
from workflows.engine.identity import Identity, differences, identities
from workflows.engine.store import ArtifactStore


def explain(workflow: Workflow, step: str, *tokens: Tokens) -> None:
    """Show what a step's fingerprint is made of; `--against RUN` shows what differs from that run's.

    Args:
        workflow: a name or a file.
        step: the step's name.
    """
    with_parameters("explain", find_workflow(workflow), tokens, ExplainOptions(), partial(_explain, step))


def _explain(step: str, found: FoundWorkflow, parameters: Mapping[str, Any], options: ExplainOptions) -> None:
    graph, store = found.graph(parameters), ArtifactStore(options.store)
    check(graph)
    name = find_step(graph, step).name
    identity = identities(graph)[name]
    if not isinstance(identity, Identity):
        raise ConfigError(f"the fingerprint of {name} cannot be known: {identity.reason}")
    commit = store.newest(identity.fingerprint)
    answer = {
        "step": name,
        "fingerprint": identity.fingerprint,
        **identity.record,
        "committed": f"generation {commit.generation} by run {commit.manifest.run}" if commit else "no",
    }
    if run := options.against:
        steps = find_run(store, run)
        if name not in steps:
            raise ConfigError(f"run {run!r} had no step {name!r}{nearest(name, list(steps))}")
        if steps[name] == identity.fingerprint:
            answer[f"against {run}"] = "the same fingerprint"
        elif other := store.newest(steps[name]):
            answer[f"against {run}"] = differences(other.manifest.identity, identity.record)
        else:
            answer[f"against {run}"] = f"another fingerprint, {steps[name]}, which has no commit to compare with"
    print_fields(answer, as_json=options.json)
