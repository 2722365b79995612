"""`stillhouse run`: runs a workflow, shows it as it goes, and ends with what came out and where to look."""

import shlex
from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any

from rich.console import Console
from rich.text import Text

from stages.formats.metrics import droppable_labels
from stages.formats.report import Report
from stages.promote.leaderboard import CHAMPION_MARK, leaderboard
from workflows.commands.find import FoundWorkflow, find_workflow
from workflows.commands.options import DEFAULT_STORE, FAILED, OK, RunOptions, Tokens, Workflow
from workflows.commands.output import console, duration, print_json, print_table
from workflows.commands.parameters import changed_parameters, with_parameters
from workflows.commands.terminal import progress_line, watching
from workflows.engine.interrupts import interruptible
from workflows.engine.plan import Plan, PlanInterrupted
from workflows.engine.redaction import redacted
from workflows.engine.results import Watcher
from workflows.engine.run import Execution, execute


def run(workflow: Workflow, *tokens: Tokens) -> int | None:
    """Run a workflow; `stillhouse run WORKFLOW --help` lists its parameters.

    Args:
        workflow: a name (`stillhouse workflows` lists them) or a file: path/to/file.py[:function].
    """
    command = shlex.join(["stillhouse", "run", workflow, *tokens])
    return with_parameters("run", find_workflow(workflow), tokens, RunOptions(), partial(_run, command))


def _run(command: str, found: FoundWorkflow, parameters: Mapping[str, Any], options: RunOptions) -> int:
    graph = found.graph(parameters)
    out = console(stderr=options.json, quiet=options.json)

    notify = partial(out.print, "\nstopping; another Ctrl-C or SIGTERM leaves at once", style="yellow")
    with interruptible(notify) as interrupt, ExitStack() as stack:
        progress = stack.enter_context(progress_line(out, "planning"))

        def watch(plan: Plan) -> AbstractContextManager[Watcher]:
            stack.close()
            return watching(out, plan)

        try:
            execution = execute(
                graph,
                options.settings,
                watch=watch,
                interrupt=interrupt,
                params=changed_parameters(found, parameters),
                command=command,
                by_value=found.by_value,
                progress=progress,
            )
        except PlanInterrupted as error:
            error.exit_code = interrupt.exit_code
            raise
    if options.json:
        print_json(execution_json(execution))
    else:
        print_execution(out, execution, options)
    return OK if execution.result.succeeded else interrupt.exit_code if execution.result.interrupted else FAILED


def execution_json(execution: Execution) -> dict[str, Any]:
    """Return a run as plain JSON: its steps, what it ran, candidates and verdict."""
    result = execution.result
    steps = [
        {
            **execution.plan.steps[name].to_json(),
            "outcome": step.outcome,
            "artifact": execution.store.uri_of(f"artifacts/{step.commit.fingerprint}") if step.commit else None,
            "detail": step.reason,
            "log": step.log,
            "attempts": step.attempts,
        }
        for name, step in result.steps.items()
    ]
    reports = list(execution.reports.values())
    candidates = [
        {"artifact": candidate.uri, **candidate.model_dump(mode="json", include={"name", "metrics", "params", "notes"})}
        for report in reports
        for candidate in report.candidates
    ]
    return {
        "run": result.run,
        "outcome": "succeeded" if result.succeeded else "interrupted" if result.interrupted else "failed",
        "executed": result.executed,
        "steps": steps,
        "candidates": candidates,
        "verdict": reports[-1].verdict.model_dump(mode="json") if reports else None,
        "seconds": round(execution.seconds, 3),
        "tracking_uri": redacted(execution.tracking_uri),
        "tracking_problem": execution.tracking.error or execution.not_sent or None,
    }


def print_execution(out: Console, execution: Execution, options: RunOptions) -> None:
    """Print how a run ended, what came out, and where to look."""
    result = execution.result
    for step in result.steps.values():
        if step.outcome in ("failed", "skipped") and (step.log or out.is_terminal):
            reason = f": {step.reason}" if out.is_terminal else ""  # elsewhere the line that said it is still there
            style = "bold red" if step.outcome == "failed" else "dim"
            out.print(Text(f"{step.name} {step.outcome}{reason}", style=style), soft_wrap=True)
            if step.log:
                out.print(f"  the whole log: {step.log}", soft_wrap=True)
    for report in execution.reports.values():
        _print_report(out, report)
    outcomes = Counter(step.outcome for step in result.steps.values())
    counts = [f"{result.executed} steps run", f"{outcomes['hit']} found"]
    counts += [f"{outcomes[name]} {name}" for name in ("failed", "skipped", "cancelled") if outcomes[name]]
    state = "finished" if result.succeeded else "interrupted" if result.interrupted else "failed"
    out.print(f"\nrun {result.run} {state} in {duration(execution.seconds)}: {', '.join(counts)}")
    if execution.tracking.waiting:
        text = (
            f"{execution.tracking.waiting} events wait for MLflow at {redacted(execution.tracking_uri)}: "
            f"{execution.tracking.error}; a later run publishes those that the store has"
        )
        out.print(Text(text, style="yellow"))
    elif execution.not_sent:
        out.print(Text(execution.not_sent, style="yellow"))
    where = "" if options.store == DEFAULT_STORE else f" --store {shlex.quote(options.store)}"
    uri = options.tracking_uri
    tracking = where + (f" --tracking-uri {shlex.quote(redacted(uri))}" if uri else "")
    look = f"look: stillhouse ui{tracking} · stillhouse compare{tracking} · stillhouse artifacts list{where}"
    out.print(look, soft_wrap=True)
    if not result.succeeded:
        fix = "fix what failed, then " if outcomes["failed"] else ""
        out.print(f"go on: {fix}run the same command again; what is committed is not run again")


def _print_report(out: Console, report: Report) -> None:
    """Print a report's leaderboard and its verdict."""
    verdict, (headings, rows) = report.verdict, leaderboard(report)
    out.print()
    print_table(out, headings, rows, droppable=droppable_labels(), title="candidates", marked=CHAMPION_MARK)
    out.print(Text(f"\n{verdict.outcome}", style="bold green" if verdict.champion else "bold yellow"))
    for line in [*verdict.reasons, *(claim.text for claim in verdict.claims)]:
        out.print(f"  {line}", soft_wrap=True)
    for warning in verdict.warnings:
        out.print(Text(f"  warning: {warning}", style="yellow"), soft_wrap=True)
