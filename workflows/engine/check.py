"""The graph's linter: everything that can be known to be wrong before anything runs, one function a rule.

Each rule yields sentences; `check` raises one `ConfigError` with all of them.
"""

import re
from collections.abc import Callable, Iterator, Mapping

from stages.contract import ExternalData, Input, Kind, Stage
from stages.errors import ConfigError, nearest
from workflows.engine.graph import Handle, Source, Step, Workflow

STEP_NAME = re.compile(r"[a-z0-9][a-z0-9.-]*")


def check(workflow: Workflow) -> None:
    """Raise one error that names everything that is wrong with a graph.

    Raises:
        ConfigError: at least one rule is broken.
    """
    problems = [problem for rule in RULES for problem in rule(workflow)]
    if not problems:
        workflow.in_order()
        problems = list(_stages_fit(workflow))
    if problems:
        raise ConfigError(
            f"workflow {workflow.name!r} cannot run:\n" + "\n".join(f"  - {problem}" for problem in problems)
        )


def _has_steps(workflow: Workflow) -> Iterator[str]:
    if not workflow.steps:
        yield "it has no steps"


def _names_are_legal(workflow: Workflow) -> Iterator[str]:
    for name in workflow.steps:
        if not STEP_NAME.fullmatch(name):
            yield f"step name {name!r} is not of the form [a-z0-9][a-z0-9.-]*"


def _steps_exist(workflow: Workflow) -> Iterator[str]:
    for step in workflow.steps.values():
        for name, source in step.sources():
            if isinstance(source, Handle) and source.step not in workflow.steps:
                hint = nearest(source.step, list(workflow.steps))
                yield f"{step.name}.{name} comes from step {source.step!r}, which is not in the workflow{hint}"


def _inputs_are_known(workflow: Workflow) -> Iterator[str]:
    for step in workflow.steps.values():
        known = step.stage.INPUTS
        for name in step.inputs:
            if name not in known:
                yield f"{step.name}: {type(step.stage).__name__} has no input {name!r}{nearest(name, list(known))}"
        for name, spec in known.items():
            if spec.required and not step.inputs.get(name):
                yield f"{step.name}: {type(step.stage).__name__} needs an input {name!r} of kind {_kinds(spec)}"


def _kinds_fit(workflow: Workflow) -> Iterator[str]:
    for step in workflow.steps.values():
        for name, wiring in step.inputs.items():
            spec = step.stage.INPUTS.get(name)
            if spec is None:
                continue
            if isinstance(wiring, Mapping) != spec.many:
                what = "a mapping from candidate name to artifact" if spec.many else "one artifact"
                yield f"{step.name}.{name} takes {what}"
                continue
            sources = wiring.values() if isinstance(wiring, Mapping) else (wiring,)
            for source in sources:
                if (kind := _kind(workflow, source)) not in spec.kinds:
                    yield f"{step.name}.{name} is wired to {_label(source)}, a {kind}; expected {_kinds(spec)}"


def _required_needs_required(workflow: Workflow) -> Iterator[str]:
    for step in workflow.steps.values():
        for need in sorted(step.needs()):
            if step.required and need in workflow.steps and not workflow.steps[need].required:
                yield f"{step.name} is required but needs {need}, which is not"


def _stages_fit(workflow: Workflow) -> Iterator[str]:
    """Let each stage compare its config with those that feed it; what is wrong with several is said once."""
    found: dict[str, list[str]] = {}

    def origin(source: Source) -> Stage | ExternalData:
        return workflow.steps[source.step].stage if isinstance(source, Handle) else source.checkpoint

    for step in workflow.steps.values():
        sources = {
            name: {key: origin(s) for key, s in wiring.items()} if isinstance(wiring, Mapping) else origin(wiring)
            for name, wiring in step.inputs.items()
        }
        try:
            step.stage.check(sources)
        except ConfigError as error:
            found.setdefault(str(error), []).append(step.name)
    yield from (f"{', '.join(names)}: {problem}" for problem, names in found.items())


def _kind(workflow: Workflow, source: Source) -> Kind:
    if isinstance(source, Handle) and source.step in workflow.steps:
        return workflow.steps[source.step].stage.KIND
    return source.kind


def _label(source: Source) -> str:
    return f"step {source.step!r}" if isinstance(source, Handle) else f"external data {source.name!r}"


def _kinds(spec: Input) -> str:
    return " or ".join(spec.kinds)


def find_step(workflow: Workflow, name: str) -> Step:
    """Return a step by name.

    Raises:
        ConfigError: there is none; names the nearest.
    """
    if name not in workflow.steps:
        raise ConfigError(f"workflow {workflow.name!r} has no step {name!r}{nearest(name, list(workflow.steps))}")
    return workflow.steps[name]


RULES: tuple[Callable[[Workflow], Iterator[str]], ...] = (
    _has_steps,
    _names_are_legal,
    _steps_exist,
    _inputs_are_known,
    _kinds_fit,
    _required_needs_required,
)
