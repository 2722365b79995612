"""The options that commands share, each written once, and the exit codes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter, validators

from workflows.engine.run import Settings

OK, FAILED, WRONG, INTERRUPTED = 0, 1, 2, 130
"""Exit codes: every required step is committed; a step failed; the request is wrong; Ctrl-C. A command may return
one; else it is OK."""
DEFAULT_STORE = Settings().store

Workflow = Annotated[str, Parameter(allow_leading_hyphen=True, show_default=False)]
Tokens = Annotated[str, Parameter(show=False, allow_leading_hyphen=True)]
Flag = Annotated[bool, Parameter(negative=())]
Port = Annotated[int, Parameter(validator=validators.Number(gte=1, lte=65535))]
Count = Annotated[int, Parameter(validator=validators.Number(gte=0))]
Hours = Annotated[float, Parameter(validator=validators.Number(gte=0))]
Json = Annotated[Flag, Parameter(help="Print one JSON document and nothing else.")]
Store = Annotated[str, Parameter(help="The store: a path, s3://, gs:// or az:// URI.")]
TrackingUri = Annotated[
    str | None, Parameter(help="MLflow's tracking URI; a sqlite file inside the store if not given.")
]
Address = Annotated[str | None, Parameter(help="HOST:PORT of a Ray cluster's head; this machine if not given.")]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class WorkflowOptions:
    """What every command on a workflow takes beside the workflow's own parameters.

    cyclopts flattens it into the command's own options (`name="*"`): a field is an option, its docstring the help.
    """

    json: Json = False
    store: Store = DEFAULT_STORE
    params: Path | None = None
    """A YAML file of the workflow's parameters; options override it."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class RunOptions(WorkflowOptions):
    """What a request for a run takes besides."""

    tracking_uri: TrackingUri = None
    address: Address = None
    only: str | None = None
    """This step and what it needs."""
    strict_code: Flag = False
    """A found result whose stage's code changed since is made again."""
    verbose: Flag = False
    """Let Ray's and the workers' own output through."""

    @property
    def settings(self) -> Settings:
        """What the engine is asked with."""
        return Settings(self.store, self.tracking_uri, self.address, self.only, self.strict_code, self.verbose)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ExplainOptions(WorkflowOptions):
    """What `explain` takes besides."""

    against: str | None = None
    """A run's id: show what differs from the step's result in it."""
