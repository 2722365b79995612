"""Durations, sizes and tables as people read them."""

from collections.abc import Sequence

from rich.filesize import decimal as size
from rich.table import Table

__all__ = ["GAP", "duration", "fitting_table", "plain_table", "size"]

GAP = 2
"""Spaces between a table's columns."""


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


def fitting_table(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    width: int,
    droppable: Sequence[str] = (),
    title: str | None = None,
) -> Table:
    """Return a table that fits a terminal: columns are left out, the first of `droppable` first, until it does."""
    wide = {head: max(len(head), *(len(row[index]) for row in rows), 0) for index, head in enumerate(headings)}
    shown = list(headings)
    for head in droppable:
        if sum(wide[name] + GAP for name in shown) > width and head in shown:
            shown.remove(head)
    table = plain_table(title=title, headings=True)
    for head in shown:
        first = head == headings[0]  # names stay whole; other headings may break
        table.add_column(
            head, justify="left" if first else "right", overflow="fold", min_width=wide[head] if first else None
        )
    for row in rows:
        table.add_row(*(row[headings.index(head)] for head in shown))
    return table
