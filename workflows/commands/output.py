"""Where commands print: the console, names and values, and JSON documents."""

import json
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import IO, Any

from rich.console import Console
from rich.pretty import Pretty

from workflows.commands.formatting import plain_table

PIPE_COLUMNS = 140


class LastingConsole(Console):
    """A console that outlives the reader of its pipe (`… | head`): what goes on does so unseen."""

    def on_broken_pipe(self) -> None:
        """Send what is still printed nowhere, rather than end the process in the middle of a run."""
        self.quiet = True
        _discard(self.file)


def console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """Return a console that fits the terminal; a file or pipe gets lines of a fixed width."""
    # No markup: errors and names hold brackets of their own, as gloo's "[/pytorch/…]".
    plain: dict[str, Any] = {"stderr": stderr, "quiet": quiet, "markup": False, "emoji": False}
    made = LastingConsole(**plain)
    return made if made.is_terminal else LastingConsole(**plain, width=PIPE_COLUMNS)


def say(text: str) -> None:
    """Print a line as it is: neither wrapped nor colored."""
    console().print(text, highlight=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """Write one JSON document to standard output."""
    try:
        sys.stdout.write(json.dumps(value, indent=1) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        _discard(sys.stdout)


def _discard(stream: IO[str]) -> None:
    """Let what a stream still holds, and all that comes, go nowhere."""
    with suppress(OSError):  # it is no file of the system's
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def print_fields(answer: Mapping[str, Any], *, as_json: bool) -> None:
    """Print names and values: as a table, or as one JSON document."""
    if as_json:
        print_json(answer)
        return
    table = plain_table()
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in answer.items():
        table.add_row(name, value if isinstance(value, str) else Pretty(value, expand_all=False))
    console().print(table)
