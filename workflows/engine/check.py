"""The graph's linter: everything that can be known to be wrong before anything runs, one function a rule.

Each rule yields sentences; `check` raises one `ConfigError` with all of them.
"""

import re
from collections.abc import Iterator, Mapping

from stages.contract import ExternalData, Stage
from stages.errors import ConfigError, nearest
from workflows.engine.graph import Handle, Source, Step, Workflow

STEP_NAME = re.compile(r"[a-z0-9][a-z0-9.-]*")


def check(workflow: Workflow) -> None:
    """Raise one error that names everything that is wrong with a graph.

    Raises:
        ConfigError: at least one rule is broken.
    """
    steps = workflow.steps.values()
    rules = (_name_is_legal, _sources_exist, _inputs_are_known, _kinds_fit, _required_needs_required)
    problems = [problem for step in steps for rule in rules for problem in rule(workflow, step)]
    if not steps:
        problems = ["it has no steps"]
    if not problems:
        workflow.in_order()
        problems = [problem for step in steps for problem in _stage_fits(workflow, step)]
    if problems:
        raise ConfigError(
            f"workflow {workflow.name!r} cannot run:\n" + "\n".join(f"  - {problem}" for problem in problems)
        )


def _name_is_legal(workflow: Workflow, step: Step) -> Iterator[str]:
    if not STEP_NAME.fullmatch(step.name):
        yield f"step name {step.name!r} is not of the form [a-z0-9][a-z0-9.-]*"


def _sources_exist(workflow: Workflow, step: Step) -> Iterator[str]:
    for name, source in step.sources():
        if isinstance(source, Handle) and source.step not in workflow.steps:
            hint = nearest(source.step, list(workflow.steps))
            yield f"{step.name}.{name} comes from step {source.step!r}, which is not in the workflow{hint}"


def _inputs_are_known(workflow: Workflow, step: Step) -> Iterator[str]:
    known, stage = step.stage.INPUTS, type(step.stage).__name__
    for name in step.inputs:
        if name not in known:
            yield f"{step.name}: {stage} has no input {name!r}{nearest(name, list(known))}"
    for name, spec in known.items():
        if spec.required and not step.inputs.get(name):
            yield f"{step.name}: {stage} needs an input {name!r} of kind {' or '.join(spec.kinds)}"


def _kinds_fit(workflow: Workflow, step: Step) -> Iterator[str]:
    for name, wiring in step.inputs.items():
        spec = step.stage.INPUTS.get(name)
        if spec is None:
            continue
        if isinstance(wiring, Mapping) != spec.many:
            what = "a mapping from candidate name to artifact" if spec.many else "one artifact"
            yield f"{step.name}.{name} takes {what}"
            continue
        for source in wiring.values() if isinstance(wiring, Mapping) else (wiring,):
            if isinstance(source, Handle):
                made_by = workflow.steps.get(source.step)
                kind, label = made_by.stage.KIND if made_by else source.kind, f"step {source.step!r}"
            else:
                kind, label = source.kind, f"external data {source.name!r}"
            if kind not in spec.kinds:
                yield f"{step.name}.{name} is wired to {label}, a {kind}; expected {' or '.join(spec.kinds)}"


def _required_needs_required(workflow: Workflow, step: Step) -> Iterator[str]:
    for need in sorted(step.needs()):
        if step.required and need in workflow.steps and not workflow.steps[need].required:
            yield f"{step.name} is required but needs {need}, which is not"


def _stage_fits(workflow: Workflow, step: Step) -> Iterator[str]:
    """Let a stage compare its config with those that feed it."""

    def origin(source: Source) -> Stage | ExternalData:
        return workflow.steps[source.step].stage if isinstance(source, Handle) else source.checkpoint

    try:
        step.stage.check(step.wired(origin))
    except ConfigError as error:
        yield f"{step.name}: {error}"


def find_step(workflow: Workflow, name: str) -> Step:
    """Return a step by name.

    Raises:
        ConfigError: there is none; names the nearest.
    """
    if name not in workflow.steps:
        raise ConfigError(f"workflow {workflow.name!r} has no step {name!r}{nearest(name, list(workflow.steps))}")
    return workflow.steps[name]
