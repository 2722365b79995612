"""What people see: the plan, the run as it goes, and what came out. Renders with rich; decides nothing."""

import shlex
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.table import Table
from rich.text import Text

from stages.promote.leaderboard import leaderboard
from workflows.engine.plan import Plan, StepPlan
from workflows.engine.redaction import redacted
from workflows.engine.results import StepResult, Watcher
from workflows.engine.run import Execution
from workflows.engine.schedule import Phase

STATUS_STYLE = {"HIT": "green", "MISS": "yellow", "BLOCKED": "bold red"}
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


def size(num_bytes: float) -> str:
    """Return bytes as people say them, in powers of 1,000."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def needs(step: StepPlan) -> str:
    """Return what a step takes of the cluster."""
    resources = step.step.resources
    text = f"{resources.workers} × {resources.cpus_per_worker:g} CPU"
    return text + (f" + {resources.gpus_per_worker:g} GPU" if resources.gpus_per_worker else "")


def plan_table(plan: Plan) -> Table:
    """Return the plan as a table."""
    table = Table(
        title=f"plan of {plan.workflow.name}", title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0)
    )
    for heading in ("step", "stage", "status", "why", "needs", "took last"):
        table.add_column(heading, overflow="fold", no_wrap=heading in ("step", "status", "needs", "took last"))
    for step in plan.steps.values():
        last = duration(step.seconds_estimate) if step.seconds_estimate is not None else "–"
        status = Text(step.status, style=STATUS_STYLE[step.status])
        table.add_row(step.step.name, type(step.step.stage).__name__, status, step.reason, needs(step), last)
    return table


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
    took: float | None = None
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
    live: Live | None = None

    def __post_init__(self) -> None:
        """Take the plan's hits as committed, and what it has blocked as skipped."""
        first = {"HIT": (Phase.COMMITTED, "found"), "BLOCKED": (Phase.SKIPPED, ""), "MISS": (Phase.WAITING, "")}
        self.rows = {name: _Row(*first[step.status]) for name, step in self.plan.steps.items()}
        for step in self.plan.having("BLOCKED"):
            self.step(step.step.name, Phase.SKIPPED, step.reason)

    def step(self, name: str, phase: Phase, text: str) -> None:
        """Show a step's new phase."""
        row, now = self.rows[name], time.monotonic()
        if (phase, text) == (row.phase, row.text) and self.live is None and phase is not Phase.SKIPPED:
            return  # it is asked again every second what another run makes of it
        if phase is Phase.RUNNING:
            row.began, row.progress, row.first_progress = now, None, None
        if phase.over and row.began is not None:
            row.took = now - row.began
        row.phase, row.text = phase, text
        if self.live is None:
            mark, style = PHASE_MARK[phase]
            self.console.print(
                Text(f"{mark} {name} {phase.value}{': ' + text if text else ''}", style=style), soft_wrap=True
            )

    def progress(self, name: str, done: float, total: float, unit: str) -> None:
        """Show how far a step is."""
        row = self.rows[name]
        row.first_progress = row.first_progress or (time.monotonic(), done)
        row.progress = (done, total, unit)

    def note(self, name: str, text: str) -> None:
        """Show a step's line."""
        self.rows[name].note = text
        if self.live is None:
            self.console.print(Text(f"  {name}: {text}", style="dim"), soft_wrap=True)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the steps as they stand."""
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, GAP, 0, 0))
        # Names and times stay whole: where the terminal is narrow it is the detail that is cut.
        widths = (1, max(map(len, self.rows), default=0), len("59 min 59 s"))
        for width in widths:
            table.add_column(width=width, no_wrap=True)
        table.add_column(no_wrap=True)
        left = max(1, options.max_width - sum(widths) - GAP * len(widths))
        now = time.monotonic()
        for name, row in self.rows.items():
            mark, style = PHASE_MARK[row.phase]
            took = row.took if row.took is not None else now - row.began if row.began is not None else None
            detail = self._detail(row, now) if row.phase is Phase.RUNNING else row.text
            if row.phase is Phase.COMMITTED and row.took is not None:  # its text is how long it took: that has a column
                detail = row.note
            line = Text(detail.split("\n")[0])
            line.truncate(left, overflow="ellipsis")
            spent = Text(duration(took) if took is not None else "", justify="right")
            table.add_row(Text(mark, style=style), Text(name, style=style), spent, line)
        yield table

    def _detail(self, row: _Row, now: float) -> str:
        if row.progress is None:
            return " ".join(part for part in (row.text, row.note or "starting") if part)
        done, total, unit = row.progress
        assert row.first_progress is not None
        since, start = row.first_progress
        parts = [f"{done / total:.0%} of {total:,.0f} {unit}" if total else unit]
        if now > since and done > start:
            rate = (done - start) / (now - since)
            parts.append(f"{rate:,.0f} {unit}/s" if rate >= 10 else f"{rate:.1f} {unit}/s")
            if done < total:
                parts.append(f"{duration((total - done) / rate)} left")
        return ", ".join(parts) + (f" · {row.note}" if row.note else "")


@contextmanager
def watching(console: Console, plan: Plan) -> Iterator[Watcher]:
    """Show a run as it goes."""
    console.print(Text(plan_summary(plan), style="bold"))
    watcher = LiveWatcher(console, plan)
    if not console.is_terminal:
        yield watcher
        return
    with Live(watcher, console=console, refresh_per_second=REFRESH_PER_SECOND, transient=False) as live:
        watcher.live = live
        yield watcher


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
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, GAP, 0, 0))
    for head in shown:
        first = head == headings[0]  # names stay whole; other headings may break
        table.add_column(
            head, justify="left" if first else "right", overflow="fold", min_width=wide[head] if first else None
        )
    for row in rows:
        table.add_row(*(row[headings.index(head)] for head in shown))
    return table


def leaderboard_table(report: Mapping[str, Any], width: int) -> Table:
    """Return a report's candidates as a table; what a narrow terminal leaves out stands in Markdown and MLflow."""
    headings, rows = leaderboard(report)
    droppable = ("bits/weight", "memory MB", "ms/token p95", "tokens/s", "KL to student", "x smaller", "ms/token p50")
    table = fitting_table(headings, rows, width=width, droppable=droppable, title="candidates")
    champion = report["verdict"]["champion"]
    for index, row in enumerate(rows):
        if champion and row[0].split()[0] == champion:
            table.rows[index].style = "bold green"
    return table


def print_outcome(console: Console, execution: Execution, *, store: str, tracking_uri: str | None) -> None:
    """Print how a run ended, what came out, and where to look."""
    result = execution.result
    for step in result.steps.values():
        if step.outcome in ("failed", "skipped"):
            _print_failure(console, step, brief=not console.is_terminal)
    for report in execution.reports.values():
        console.print()
        console.print(leaderboard_table(report.to_json(), console.width))
        console.print()
        verdict = report.verdict
        console.print(Text(verdict.outcome, style="bold green" if verdict.champion else "bold yellow"))
        for line in [*verdict.reasons, *(claim.text for claim in verdict.claims)]:
            console.print(f"  {line}", highlight=False, soft_wrap=True)
    console.print()
    outcomes = Counter(step.outcome for step in result.steps.values())
    counts = [f"{result.executed} steps run", f"{outcomes['hit']} found"]
    counts += [f"{outcomes[name]} {name}" for name in ("failed", "skipped", "cancelled") if outcomes[name]]
    state = "finished" if result.succeeded else "interrupted" if result.interrupted else "failed"
    console.print(
        f"run {result.run} {state} in {duration(execution.seconds)}: {', '.join(counts)}",
        highlight=False,
    )
    if execution.ledger is not None and execution.ledger.waiting:
        text = (
            f"{execution.ledger.waiting} records wait for MLflow at {redacted(execution.tracking_uri)}: "
            f"{execution.ledger.error}; the next run sends them"
        )
        console.print(Text(text, style="yellow"))
    where = "" if store == "./.stillhouse" else f" --store {shlex.quote(store)}"
    ledger = where + (f" --tracking-uri {shlex.quote(redacted(tracking_uri))}" if tracking_uri else "")
    look = f"look: stillhouse ui{ledger} · stillhouse compare{ledger} · stillhouse artifacts list{where}"
    console.print(look, highlight=False, soft_wrap=True)
    if not result.succeeded:
        mended = "mend what failed, then " if outcomes["failed"] else ""
        console.print(f"go on: {mended}run the same command again; what is committed is not run again", highlight=False)


def _print_failure(console: Console, step: StepResult, *, brief: bool) -> None:
    """Print why a step failed or was skipped; briefly where the line that told it when it happened is still there."""
    style = "bold red" if step.outcome == "failed" else "dim"
    if step.log or not brief:
        reason = "" if brief else f": {step.reason}"
        console.print(Text(f"{step.name} {step.outcome}{reason}", style=style), soft_wrap=True)
    if step.log:
        console.print(f"  the whole log: {step.log}", highlight=False, soft_wrap=True)
