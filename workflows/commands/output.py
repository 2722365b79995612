"""What commands print: the console, names and values, and the JSON documents."""

import json
import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from workflows.engine.plan import Plan
from workflows.engine.redaction import redacted
from workflows.engine.run import Execution

PIPE_COLUMNS = 140


def console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """Return a console that fits the terminal; a file or pipe gets lines of a fixed width."""
    # No markup: errors and names hold brackets of their own, as gloo's "[/pytorch/…]".
    plain: dict[str, Any] = {"stderr": stderr, "quiet": quiet, "markup": False, "emoji": False}
    made = Console(**plain)
    return made if made.is_terminal else Console(**plain, width=PIPE_COLUMNS)


def print_json(value: Any) -> None:
    """Write one JSON document to standard output."""
    sys.stdout.write(json.dumps(value, indent=1) + "\n")


def print_fields(answer: Mapping[str, Any]) -> None:
    """Print names and values."""
    from rich.pretty import Pretty

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in answer.items():
        table.add_row(name, value if isinstance(value, str) else Pretty(value, expand_all=False))
    console().print(table)


def plan_json(planned: Plan) -> dict[str, Any]:
    """Return a plan as plain JSON."""
    return {"workflow": planned.workflow.name, "steps": [step.to_json() for step in planned.steps.values()]}


def execution_json(execution: Execution) -> dict[str, Any]:
    """Return a run as plain JSON: its steps, what it ran, candidates and verdict."""
    result = execution.result
    steps = []
    for name, step in result.steps.items():
        artifact = execution.store.uri_of(f"artifacts/{step.commit.fingerprint}") if step.commit else None
        planned = execution.plan.steps[name].to_json()
        steps.append(
            {
                **planned,
                "outcome": step.outcome,
                "artifact": artifact,
                "detail": step.reason,
                "log": step.log,
                "attempts": step.attempts,
            }
        )
    reports = list(execution.reports.values())
    candidates = [
        {
            "name": c.name,
            "artifact": c.uri,
            "metrics": c.metrics,
            "params": c.params,
            "notes": c.notes,
        }
        for report in reports
        for c in report.candidates
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
    }
