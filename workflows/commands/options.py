"""What the commands' options are called, and the exit codes."""

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter, validators

OK, FAILED, WRONG, INTERRUPTED = 0, 1, 2, 130
"""Exit codes: every required step is committed; a step failed; the request is wrong; Ctrl-C."""

Tokens = Annotated[str, Parameter(show=False, allow_leading_hyphen=True)]
Name = Annotated[str, Parameter(allow_leading_hyphen=True, show_default=False)]
Store = Annotated[str, Parameter(help="The store: a path, s3://, gs:// or az:// URI.")]
TrackingUri = Annotated[
    str | None, Parameter(help="MLflow's tracking URI; a sqlite file inside the store if not given.")
]
Port = Annotated[int, Parameter(validator=validators.Number(gte=1, lte=65535))]
Count = Annotated[int, Parameter(validator=validators.Number(gte=0))]
AsJson = Annotated[bool, Parameter(name="--json", negative=(), help="Print one JSON document and nothing else.")]

HELP = ("--help", "-h")

COMMON: dict[str, tuple[Any, Any]] = {
    "params": (
        Annotated[Path | None, Parameter(help="A YAML file of the workflow's parameters; options override it.")],
        None,
    ),
    "store": (Store, "./.stillhouse"),
    "address": (
        Annotated[str | None, Parameter(help="HOST:PORT of a Ray cluster's head; this machine if not given.")],
        None,
    ),
    "only": (Annotated[str | None, Parameter(help="This step and what it needs.")], None),
    "strict_code": (
        Annotated[bool, Parameter(negative=(), help="A found result whose stage's code changed since is made again.")],
        False,
    ),
    "json": (AsJson, False),
    "tracking_uri": (TrackingUri, None),
    "verbose": (Annotated[bool, Parameter(negative=(), help="Let Ray's and the workers' own output through.")], False),
}
