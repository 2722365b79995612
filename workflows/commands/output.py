"""How commands print: the console, tables, durations and sizes as people read them, and JSON documents."""

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from rich.console import Console
from rich.filesize import decimal as size
from rich.pretty import Pretty
from rich.table import Table

__all__ = ["GAP", "console", "duration", "plain_table", "print_fields", "print_json", "print_table", "say", "size"]

PIPE_COLUMNS = 140
GAP = 2
"""Spaces between a table's columns."""


class LastingConsole(Console):
    """A console that outlives the reader of its pipe (`… | head`): what goes on does so unseen."""

    def on_broken_pipe(self) -> None:
        """Send what is still printed nowhere, rather than end the process in the middle of a run."""
        self.quiet = True
        with suppress(OSError):  # it is no file of the system's
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


def console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """Return a console that fits the terminal; a file or pipe gets lines of a fixed width."""
    # No markup: errors and names hold brackets of their own, as gloo's "[/pytorch/…]".
    plain: dict[str, Any] = {"stderr": stderr, "quiet": quiet, "markup": False, "emoji": False, "highlight": False}
    made = LastingConsole(**plain)
    return made if made.is_terminal else LastingConsole(**plain, width=PIPE_COLUMNS)


def say(text: str) -> None:
    """Print a line as it is: neither wrapped nor colored."""
    console().print(text, soft_wrap=True)


def print_json(value: Any) -> None:
    """Write one JSON document to standard output."""
    console().out(json.dumps(value, indent=1), highlight=False)


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


def duration(seconds: float) -> str:
    """Return seconds as people say them: `0.4 s`, `12 s`, `3 min 5 s`, `2 h 10 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def plain_table(*, title: str | None = None, headings: bool = False) -> Table:
    """Return a table without lines."""
    return Table(
        title=title, title_justify="left", box=None, show_header=headings, pad_edge=False, padding=(0, GAP, 0, 0)
    )


def print_table(
    out: Console,
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    droppable: Sequence[str] = (),
    title: str | None = None,
    marked: str = "\0",
) -> None:
    """Print a table that fits: columns are left out, the first of `droppable` first, until it does.

    A row whose first cell holds `marked` is shown in green.
    """
    wide = {head: max(len(head), *(len(row[index]) for row in rows), 0) for index, head in enumerate(headings)}
    shown = list(headings)
    for head in droppable:
        if sum(wide[name] + GAP for name in shown) > out.width and head in shown:
            shown.remove(head)
    table = plain_table(title=title, headings=True)
    table.add_column(shown[0], overflow="fold", min_width=wide[shown[0]])  # names stay whole; other headings may break
    for head in shown[1:]:
        table.add_column(head, justify="right", overflow="fold")
    for row in rows:
        cells = (row[headings.index(head)] for head in shown)
        table.add_row(*cells, style="bold green" if marked in row[0] else None)
    out.print(table)
