"""A workflow's graph as pure data: steps, what feeds them, and where they run.

A workflow function builds a `Workflow`, adds steps and returns it. Nothing runs; nothing is read. The graph is
static: its shape never depends on a result.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from pydantic import Field

from stages.contract import Config, Kind, Resources, Stage
from stages.errors import ConfigError
from stages.external.checkpoints import Checkpoint

T = TypeVar("T")


class Retry(Config):
    """How often and how long a step is tried: never part of identity."""

    attempts: int = Field(3, ge=1)
    """Tries in all, the first one included. Only failures that trying again may cure are tried again; those with a
    smaller micro-batch do not count."""
    backoff_seconds: float = Field(5.0, ge=0)
    """Wait before the second try; doubled before each further one."""
    timeout_seconds: float | None = Field(None, gt=0)
    """Wall-clock limit of one attempt, from when its work has its resources; None for no limit."""
    pending_timeout_seconds: float = Field(600.0, gt=0)
    """How long an attempt may wait for its resources: until its stage reports `reporter.started()`."""


@dataclass(frozen=True, slots=True)
class Handle:
    """The artifact that a step of this workflow will leave."""

    step: str
    kind: Kind


@dataclass(frozen=True, slots=True)
class ExternalHandle:
    """A checkpoint from outside, read where it lies."""

    name: str
    checkpoint: Checkpoint
    kind: Kind = "model"


Source = Handle | ExternalHandle
Wiring = Source | Mapping[str, Source]


@dataclass(frozen=True, slots=True)
class Step:
    """A named use of a stage."""

    name: str
    stage: Stage
    inputs: Mapping[str, Wiring] = field(default_factory=dict)
    resources: Resources = field(default_factory=Resources)
    retry: Retry = field(default_factory=Retry)
    required: bool = True
    """Whether the run fails if this step does."""

    def sources(self) -> Iterator[tuple[str, Source]]:
        """Yield every (input name, source), those of mappings as `input[candidate]`."""
        for name, wiring in self.inputs.items():
            if isinstance(wiring, Mapping):
                yield from ((f"{name}[{key}]", source) for key, source in wiring.items())
            else:
                yield name, wiring

    def wired(self, value_of: Callable[[Source], T]) -> dict[str, T | Mapping[str, T]]:
        """Return the inputs with a value in place of each source."""
        return {
            name: {key: value_of(s) for key, s in wiring.items()} if isinstance(wiring, Mapping) else value_of(wiring)
            for name, wiring in self.inputs.items()
        }

    def needs(self) -> frozenset[str]:
        """Return the names of the steps that must be committed first."""
        return frozenset(source.step for _, source in self.sources() if isinstance(source, Handle))


class Workflow:
    """A graph under construction; complete once its function returns it."""

    def __init__(self, name: str, *, base_model: str = "") -> None:
        """Start a graph; `base_model` names what is compressed and, with `name`, the MLflow experiment."""
        self.name = name
        self.base_model = base_model
        self.steps: dict[str, Step] = {}

    @property
    def experiment(self) -> str:
        """Return the name of its MLflow experiment."""
        return f"{self.name}/{self.base_model}" if self.base_model else self.name

    def step(
        self,
        name: str,
        stage: Stage,
        *,
        resources: Resources | None = None,
        retry: Retry | None = None,
        required: bool = True,
        **inputs: Wiring | None,
    ) -> Handle:
        """Add a step and return a handle to its artifact; an input that is None is left out.

        Raises:
            ConfigError: the name is taken.
        """
        if name in self.steps:
            raise ConfigError(
                f"workflow {self.name!r} has two steps named {name!r}; step names are unique, e.g. f'train.{{student}}'"
            )
        wired = {key: value for key, value in inputs.items() if value is not None}
        self.steps[name] = Step(name, stage, wired, resources or Resources(), retry or Retry(), required)
        return Handle(name, stage.KIND)

    def external(self, name: str, checkpoint: Checkpoint) -> ExternalHandle:
        """Return a handle to a checkpoint from outside."""
        return ExternalHandle(name, checkpoint)

    def in_order(self) -> list[Step]:
        """Return the steps, each after those that it needs.

        Raises:
            ConfigError: the steps need each other in a cycle.
        """
        done: dict[str, Step] = {}
        waiting = dict(self.steps)
        while waiting:
            ready = [step for step in waiting.values() if not step.needs() & waiting.keys()]
            if not ready:
                names = ", ".join(sorted(waiting))
                raise ConfigError(f"the steps {names} need each other in a cycle; a workflow is a graph without cycles")
            done |= {step.name: waiting.pop(step.name) for step in ready}
        return list(done.values())

    def upstream(self, name: str) -> set[str]:
        """Return a step's name and those of everything that it needs."""
        found, todo = set(), [name]
        while todo:
            current = todo.pop()
            if current not in found:
                found.add(current)
                todo.extend(self.steps[current].needs())
        return found
