"""A run as it goes, on a terminal or as lines. Renders with rich; decides nothing."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from workflows.commands.output import GAP, duration, plain_table
from workflows.engine.plan import Plan
from workflows.engine.results import Watcher
from workflows.engine.schedule import Phase

PHASE_MARK = {
    Phase.WAITING: ("·", "dim"),
    Phase.BACKING_OFF: ("↻", "yellow"),
    Phase.HELD: ("⧗", "yellow"),
    Phase.RUNNING: ("▶", "cyan"),
    Phase.STOPPING: ("■", "yellow"),
    Phase.COMMITTED: ("✓", "green"),
    Phase.FAILED: ("✗", "bold red"),
    Phase.SKIPPED: ("–", "dim"),
    Phase.CANCELLED: ("■", "yellow"),
}
REFRESH_PER_SECOND = 4
LINE_SECONDS = 10.0
"""How often a file or pipe gets a line about files that are verified."""


def plan_summary(plan: Plan) -> str:
    """Return the plan in one sentence."""
    misses, hits, blocked = plan.having("MISS"), plan.having("HIT"), plan.having("BLOCKED")
    known = [step.seconds_estimate for step in misses if step.seconds_estimate is not None]
    took = f" (those that ran before took {duration(sum(known))})" if known else ""
    tail = f", {len(blocked)} blocked" if blocked else ""
    return f"{len(misses)} to run{took}, {len(hits)} found{tail}"


@dataclass(slots=True)
class _Row:
    phase: Phase = Phase.WAITING
    text: str = ""
    began: float | None = None
    ended: float | None = None
    progress: tuple[float, float, str] | None = None
    first_progress: tuple[float, float] | None = None
    """(when, how much was done): rate and time left count from the first report, not from start-up."""
    note: str = ""


@dataclass(slots=True)
class LiveWatcher(Watcher):
    """Shows every step on a terminal; on anything else prints a line for each change."""

    console: Console
    plan: Plan
    rows: dict[str, _Row] = field(default_factory=dict)

    def __post_init__(self) -> None:
        first = {"HIT": (Phase.COMMITTED, "found"), "BLOCKED": (Phase.SKIPPED, ""), "MISS": (Phase.WAITING, "")}
        self.rows = {name: _Row(*first[step.status]) for name, step in self.plan.steps.items()}
        for step in self.plan.having("BLOCKED"):
            self.step(step.step.name, Phase.SKIPPED, step.reason)

    def step(self, name: str, phase: Phase, text: str) -> None:
        """Show a step's new phase."""
        row, now = self.rows[name], time.monotonic()
        if (phase, text) == (row.phase, row.text) and not self.console.is_terminal and phase is not Phase.SKIPPED:
            return  # it is asked again every second what another run makes of it
        if phase is Phase.RUNNING:
            row.began, row.progress, row.first_progress = now, None, None
        if phase.over:
            row.ended = now
        row.phase, row.text = phase, text
        mark, style = PHASE_MARK[phase]
        self._print(f"{mark} {name} {phase.value}{': ' + text if text else ''}", style)

    def progress(self, name: str, done: float, total: float, unit: str) -> None:
        """Show how far a step is."""
        row = self.rows[name]
        row.first_progress = row.first_progress or (time.monotonic(), done)
        row.progress = (done, total, unit)

    def note(self, name: str, text: str) -> None:
        """Show a step's line."""
        self.rows[name].note = text
        self._print(f"  {name}: {text}", "dim")

    def _print(self, line: str, style: str) -> None:
        if not self.console.is_terminal:
            self.console.print(Text(line, style=style), soft_wrap=True)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the steps as they stand."""
        table = plain_table()
        # Names and times stay whole: where the terminal is narrow it is the detail that is cut.
        widths = (1, max(map(len, self.rows), default=0), len("59 min 59 s"))
        for width in widths:
            table.add_column(width=width, no_wrap=True)
        table.add_column(no_wrap=True)
        left = max(1, options.max_width - sum(widths) - GAP * len(widths))
        now = time.monotonic()
        for name, row in self.rows.items():
            mark, style = PHASE_MARK[row.phase]
            spent = duration((row.ended or now) - row.began) if row.began is not None else ""
            detail = _detail(row, now) if row.phase is Phase.RUNNING else row.text
            if row.phase is Phase.COMMITTED and spent:  # its text is how long it took: that has a column
                detail = row.note
            line = Text(detail.split("\n")[0])
            line.truncate(left, overflow="ellipsis")
            table.add_row(Text(mark, style=style), Text(name, style=style), Text(spent, justify="right"), line)
        yield table


def _detail(row: _Row, now: float) -> str:
    """Return how far a running step is, how fast, and how long it will take."""
    if row.progress is None or row.first_progress is None:
        return " ".join(part for part in (row.text, row.note or "starting") if part)
    (done, total, unit), (since, start) = row.progress, row.first_progress
    parts = [f"{done / total:.0%} of {total:,.0f} {unit}" if total else unit]
    if now > since and done > start:
        rate = (done - start) / (now - since)
        parts.append(f"{rate:,.0f} {unit}/s" if rate >= 10 else f"{rate:.1f} {unit}/s")
        if done < total:
            parts.append(f"{duration((total - done) / rate)} left")
    return ", ".join(parts) + (f" · {row.note}" if row.note else "")


@contextmanager
def progress_line(console: Console, text: str) -> Iterator[Callable[[str], None]]:
    """Show how far it is: on a terminal in a line that goes away at the end, else in one now and then."""
    if console.is_terminal:
        with console.status(text) as status:
            yield status.update
        return
    last = time.monotonic()

    def show(line: str) -> None:
        nonlocal last
        if time.monotonic() - last > LINE_SECONDS:
            console.print(line, soft_wrap=True)
            last = time.monotonic()

    yield show


@contextmanager
def watching(console: Console, plan: Plan) -> Iterator[Watcher]:
    """Show a run as it goes."""
    console.print(Text(plan_summary(plan), style="bold"))
    watcher = LiveWatcher(console, plan)
    live = Live(watcher, console=console, refresh_per_second=REFRESH_PER_SECOND, transient=False)
    with live if console.is_terminal else nullcontext():
        yield watcher
