"""Where commands print: the console, names and values, and JSON documents."""

import json
import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.pretty import Pretty

from workflows.commands.formatting import plain_table

PIPE_COLUMNS = 140


def console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """Return a console that fits the terminal; a file or pipe gets lines of a fixed width."""
    # No markup: errors and names hold brackets of their own, as gloo's "[/pytorch/…]".
    plain: dict[str, Any] = {"stderr": stderr, "quiet": quiet, "markup": False, "emoji": False}
    made = Console(**plain)
    return made if made.is_terminal else Console(**plain, width=PIPE_COLUMNS)


def say(text: str) -> None:
    """Print a line as it is: neither wrapped nor colored."""
    console().print(text, highlight=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """Write one JSON document to standard output."""
    sys.stdout.write(json.dumps(value, indent=1) + "\n")


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
