"""The options that commands share, each written once, and the exit codes.

cyclopts flattens these dataclasses into a command's own options (`name="*"`): a field is an option, its docstring the
help.
"""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter, validators

from workflows.engine.run import Settings

OK, FAILED, WRONG, INTERRUPTED = 0, 1, 2, 130
"""Exit codes: every required step is committed; a step failed; the request is wrong; Ctrl-C. A command may return
one; else it is OK."""

Workflow = Annotated[str, Parameter(allow_leading_hyphen=True, show_default=False)]
Tokens = Annotated[str, Parameter(show=False, allow_leading_hyphen=True)]
Flag = Annotated[bool, Parameter(negative=())]
Port = Annotated[int, Parameter(validator=validators.Number(gte=1, lte=65535))]
Count = Annotated[int, Parameter(validator=validators.Number(gte=0))]
Hours = Annotated[float, Parameter(validator=validators.Number(gte=0))]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """How a command answers."""

    json: Flag = False
    """Print one JSON document and nothing else."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class StoreOptions:
    """Which store."""

    store: str = "./.stillhouse"
    """The store: a path, s3://, gs:// or az:// URI."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class TrackingOptions(StoreOptions):
    """Which store, and which MLflow."""

    tracking_uri: str | None = None
    """MLflow's tracking URI; a sqlite file inside the store if not given."""

    @property
    def settings(self) -> Settings:
        """What the engine is asked with."""
        asked = {field.name for field in fields(Settings)}
        return Settings(**{name: value for name, value in asdict(self).items() if name in asked})


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class WorkflowOptions(OutputOptions, StoreOptions):
    """What every command on a workflow takes beside the workflow's own parameters."""

    params: Path | None = None
    """A YAML file of the workflow's parameters; options override it."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class RunOptions(WorkflowOptions, TrackingOptions):
    """What a request for a run takes besides."""

    address: str | None = None
    """HOST:PORT of a Ray cluster's head; this machine if not given."""
    only: str | None = None
    """This step and what it needs."""
    strict_code: Flag = False
    """A found result whose stage's code changed since is made again."""
    verbose: Flag = False
    """Let Ray's and the workers' own output through."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ExplainOptions(WorkflowOptions):
    """What `explain` takes besides."""

    against: str | None = None
    """A run's id: show what differs from the step's result in it."""
