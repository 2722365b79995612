"""`stillhouse init`: a commented workflow file to start from, that runs: a copy of `workflows/starter/`."""

import shlex
from pathlib import Path

from stages.errors import ConfigError
from workflows.commands.output import say

STARTER = Path(__file__).parent.parent / "starter" / "my_workflow.py"


def init(folder: Path) -> None:
    """Write a commented workflow file to start from, that runs.

    Args:
        folder: made if it is missing; nothing in it is overwritten.
    """
    path = folder / STARTER.name
    if path.exists():
        raise ConfigError(f"{str(path)!r} is there already and is not overwritten; give another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(STARTER.read_text())
    except OSError as error:
        raise ConfigError(f"{str(folder)!r} cannot be written: {error}") from error
    say(f"wrote {path}; run it: stillhouse run {shlex.quote(str(path))}")
