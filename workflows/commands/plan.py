"""`stillhouse plan`: what a run would do and why; starts nothing."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from workflows.commands.find import FoundWorkflow, find_workflow
from workflows.commands.options import RunOptions, Tokens, Workflow
from workflows.commands.output import console, duration, plain_table, print_json
from workflows.commands.parameters import with_parameters
from workflows.commands.terminal import plan_summary
from workflows.engine.plan import Plan
from workflows.engine.run import plan_only

STATUS_STYLE = {"HIT": "green", "MISS": "yellow", "BLOCKED": "bold red"}


def plan(workflow: Workflow, *tokens: Tokens) -> None:
    """Show what a run would do: each step HIT, MISS or BLOCKED, and why. Starts nothing.

    Args:
        workflow: a name (`stillhouse workflows` lists them) or a file: path/to/file.py[:function].
    """
    with_parameters("plan", find_workflow(workflow), tokens, RunOptions(), _plan)


def _plan(found: FoundWorkflow, parameters: Mapping[str, Any], options: RunOptions) -> None:
    planned = plan_only(found.graph(parameters), options.settings)
    if options.json:
        steps = [step.to_json() for step in planned.steps.values()]
        print_json({"workflow": planned.workflow.name, "steps": steps})
    else:
        out = console()
        out.print(plan_table(planned))
        out.print(plan_summary(planned))


def plan_table(plan: Plan) -> Table:
    """Return the plan as a table."""
    table = plain_table(title=f"plan of {plan.workflow.name}", headings=True)
    for heading in ("step", "stage", "status", "why", "needs", "took last"):
        table.add_column(heading, overflow="fold", no_wrap=heading in ("step", "status", "needs", "took last"))
    for step in plan.steps.values():
        last = duration(step.seconds_estimate) if step.seconds_estimate is not None else "–"
        status = Text(step.status, style=STATUS_STYLE[step.status])
        table.add_row(
            step.step.name, type(step.step.stage).__name__, status, step.reason, step.step.resources.demand, last
        )
    return table
