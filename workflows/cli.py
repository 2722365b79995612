"""The `stillhouse` command: parsing and printing only.

Exit codes: 0 every required step is committed; 1 a step failed; 2 the request is wrong; 130 interrupted by Ctrl-C.
With `--json`, standard output is one JSON document and nothing else.
"""

import functools
import logging
import shlex
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, CycloptsError, Parameter
from pydantic import ValidationError
from rich.table import Table
from rich.text import Text

from stages.errors import ConfigError, StillhouseError, Transient
from stages.runtime.translation import translate
from workflows.commands import inspect_store
from workflows.commands.artifacts import artifacts
from workflows.commands.find import FoundWorkflow, find_workflow, workflow_names
from workflows.commands.options import (
    COMMON,
    FAILED,
    HELP,
    INTERRUPTED,
    OK,
    WRONG,
    AsJson,
    Name,
    Port,
    Store,
    Tokens,
    TrackingUri,
)
from workflows.commands.output import console, execution_json, plan_json, print_fields, print_json
from workflows.commands.parameters import changed_parameters, format_validation_error, with_parameters
from workflows.commands.terminal import plan_summary, plan_table, print_outcome, watching
from workflows.engine.graph import Workflow
from workflows.engine.interrupts import interruptible
from workflows.engine.run import Settings, execute, plan_only

app = App(
    name="stillhouse",
    help="Distils, prunes and quantizes language models on a Ray cluster, and keeps the ledger in MLflow.",
    version_flags=["--version"],
    result_action="return_value",
)
app.command(artifacts)


def main() -> None:
    """Run the command and leave with its exit code."""
    sys.exit(run_command(sys.argv[1:]))


def run_command(argv: Sequence[str]) -> int:
    """Run the command on some arguments and return its exit code."""
    as_json = "--json" in argv
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    try:
        result = app(list(argv), exit_on_error=False, print_error=False)
    except ValidationError as error:
        return _fail("ConfigError", format_validation_error(error, error.title), WRONG, as_json)
    except CycloptsError as error:
        cause, argument = error.__cause__, error.argument
        if isinstance(cause, ValidationError) and argument is not None:
            return _fail("ConfigError", format_validation_error(cause, argument.name), WRONG, as_json)
        return _fail("ConfigError", str(error), WRONG, as_json)
    except ConfigError as error:
        return _fail(type(error).__name__, str(error), WRONG, as_json)
    except StillhouseError as error:
        return _fail(type(error).__name__, str(error), FAILED, as_json)
    except Exception as error:  # noqa: BLE001  the border of the command: a store out of reach, or a flaw of ours
        told = translate(error)
        if not isinstance(told, Transient):
            logging.getLogger(__name__).error("%s", traceback.format_exc())
        return _fail(type(error).__name__, str(told), FAILED, as_json)
    except KeyboardInterrupt:
        return _fail("Interrupted", "interrupted; run the same command again to go on", INTERRUPTED, as_json)
    return result if isinstance(result, int) else OK


def _fail(kind: str, message: str, code: int, as_json: bool) -> int:
    if as_json:
        print_json({"error": {"kind": kind, "message": message}, "exit_code": code})
    else:
        console(stderr=True).print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)
    return code


# run and plan -------------------------------------------------------------------------------------------------------


@app.command(help_flags=())
def run(workflow: Name = "--help", *tokens: Tokens) -> int:
    """Run a workflow; `stillhouse run WORKFLOW --help` lists its parameters.

    Args:
        workflow: a name (`stillhouse workflows` lists them) or a file: path/to/file.py[:function].
    """
    if workflow in HELP:
        return _help("run")
    act = functools.partial(_run, workflow)
    return with_parameters("run", find_workflow(workflow), tokens, COMMON, act)


@app.command(help_flags=())
def plan(workflow: Name = "--help", *tokens: Tokens) -> int:
    """Show what a run would do: each step HIT, MISS or BLOCKED, and why. Starts nothing.

    Args:
        workflow: a name (`stillhouse workflows` lists them) or a file: path/to/file.py[:function].
    """
    if workflow in HELP:
        return _help("plan")
    return with_parameters("plan", find_workflow(workflow), tokens, COMMON, _plan)


def _help(verb: str) -> int:
    app.help_print([verb])
    return OK


def _run(
    label: str, found: FoundWorkflow, parameters: Mapping[str, Any], options: Mapping[str, Any], tokens: Sequence[str]
) -> int:
    graph, as_json = found.graph(parameters), options["json"]
    settings = _settings(options)
    out = console(stderr=as_json, quiet=as_json)
    with interruptible(
        lambda: out.print("\nstopping; press Ctrl-C again to leave at once", style="yellow")
    ) as interrupt:
        execution = execute(
            graph,
            settings,
            watch=lambda plan: watching(out, plan),
            interrupt=interrupt,
            params=changed_parameters(found, parameters),
            command=shlex.join(["stillhouse", "run", label, *tokens]),
            by_value=found.by_value,
        )
    if as_json:
        print_json(execution_json(execution))
    else:
        print_outcome(out, execution, store=options["store"], tracking_uri=options["tracking_uri"])
    return OK if execution.result.succeeded else INTERRUPTED if execution.result.interrupted else FAILED


def _plan(
    found: FoundWorkflow, parameters: Mapping[str, Any], options: Mapping[str, Any], tokens: Sequence[str]
) -> int:
    planned = plan_only(found.graph(parameters), _settings(options))
    if options["json"]:
        print_json(plan_json(planned))
    else:
        out = console()
        out.print(plan_table(planned))
        out.print(plan_summary(planned), highlight=False)
    return OK


def _settings(options: Mapping[str, Any]) -> Settings:
    return Settings(
        **{
            name: options[name]
            for name in ("store", "tracking_uri", "address", "only", "strict_code", "verbose")
            if name in options
        }
    )


# what there is ------------------------------------------------------------------------------------------------------


@app.command
def workflows(*, json: AsJson = False) -> int:
    """List the workflows that come with stillhouse."""
    described = {name: (find_workflow(name).build.__doc__ or "").strip().split("\n")[0] for name in workflow_names()}
    if json:
        print_json({"workflows": [{"name": name, "summary": summary} for name, summary in described.items()]})
        return OK
    out = console()
    for name, summary in described.items():
        out.print(Text.assemble((f"{name:12}", "bold"), f" {summary}"))
    out.print("\nparameters: stillhouse run WORKFLOW --help · a file of your own: stillhouse init DIR", style="dim")
    return OK


@app.command
def explain(workflow: str, step: str, *tokens: Tokens) -> int:
    """Show what a step's fingerprint is made of; `--against RUN` shows what differs from that run's.

    Args:
        workflow: a name or a file.
        step: the step's name.
    """
    against = (
        Annotated[str | None, Parameter(help="A run's id: show what differs from the step's result in it.")],
        None,
    )
    return with_parameters(
        "explain", find_workflow(workflow), tokens, {**COMMON, "against": against}, functools.partial(_explain, step)
    )


def _explain(
    step: str, found: FoundWorkflow, parameters: Mapping[str, Any], options: Mapping[str, Any], tokens: Sequence[str]
) -> int:
    graph: Workflow = found.graph(parameters)
    answer = inspect_store.explain(graph, options["store"], step, against=options["against"])
    if options["json"]:
        print_json(answer)
    else:
        print_fields(answer)
    return OK


@app.command
def init(folder: Path) -> int:
    """Write a commented workflow file to start from, that runs.

    Args:
        folder: made if it is missing; nothing in it is overwritten.
    """
    from workflows.commands import starter

    path = starter.write(folder)
    console().print(f"wrote {path}; run it: stillhouse run {shlex.quote(str(path))}", highlight=False, soft_wrap=True)
    return OK


@app.command
def doctor(
    *,
    store: Store = "./.stillhouse",
    tracking_uri: TrackingUri = None,
    address: str | None = None,
    json: AsJson = False,
) -> int:
    """Look at Python, torch, GPU, Ray, MLflow, store, hub and disk: what is fine, what is not, what to do.

    Args:
        store: the store.
        tracking_uri: MLflow's tracking URI.
        address: HOST:PORT of a Ray cluster's head.
        json: print one JSON document and nothing else.
    """
    from workflows.commands.doctor import examine

    findings = examine(Settings(store=store, tracking_uri=tracking_uri, address=address))
    if json:
        print_json({"findings": [finding.to_json() for finding in findings]})
    else:
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        for finding in findings:
            mark, style = {"fine": ("✓", "green"), "note": ("·", "dim"), "wrong": ("✗", "bold red")}[finding.state]
            table.add_row(
                Text(mark, style=style),
                finding.subject,
                finding.text + (f"\n→ {finding.remedy}" if finding.remedy else ""),
            )
        console().print(table)
    return FAILED if any(finding.state == "wrong" for finding in findings) else OK


# the ledger ---------------------------------------------------------------------------------------------------------


@app.command
def compare(*runs: str, store: Store = "./.stillhouse", tracking_uri: TrackingUri = None, json: AsJson = False) -> int:
    """Show the leaderboard out of MLflow: of some runs, or of all.

    Args:
        runs: run ids.
        store: the store.
        tracking_uri: MLflow's tracking URI.
        json: print one JSON document and nothing else.
    """
    rows = inspect_store.compare(Settings(store=store, tracking_uri=tracking_uri), runs)
    if json:
        print_json({"candidates": rows})
    else:
        inspect_store.print_comparison(console(), rows)
    return OK


@app.command
def ui(*, store: Store = "./.stillhouse", tracking_uri: TrackingUri = None, port: Port = 5000) -> int:
    """Serve the MLflow UI on the store's tracking database, on this machine only.

    Args:
        store: the store.
        tracking_uri: MLflow's tracking URI.
        port: on 127.0.0.1.
    """
    return inspect_store.serve_ui(Settings(store=store, tracking_uri=tracking_uri), port, console())


if __name__ == "__main__":
    main()
