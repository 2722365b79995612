"""The `stillhouse` command: parsing and printing only.

Exit codes: 0 every required step is committed; 1 a step failed; 2 the request is wrong; 130 interrupted by Ctrl-C.
With `--json`, standard output is one JSON document and nothing else.
"""

import functools
import json
import logging
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, CycloptsError, Parameter
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from stages.errors import ConfigError, StillhouseError
from workflows import inspect_store
from workflows.engine.execute import Execution, Settings, execute, plan_only
from workflows.engine.graph import Workflow
from workflows.engine.interrupts import interruptible
from workflows.engine.plan import Plan
from workflows.find import FoundWorkflow, find_workflow, workflow_names
from workflows.parameters import changed_parameters, plain, sentence, with_parameters
from workflows.terminal import plan_summary, plan_table, print_outcome, watching

OK, FAILED, WRONG, INTERRUPTED = 0, 1, 2, 130
PIPE_COLUMNS = 140

app = App(
    name="stillhouse",
    help="Distils, prunes and quantizes language models on a Ray cluster, and keeps the ledger in MLflow.",
    version_flags=["--version"],
    result_action="return_value",
)
artifacts = App(
    name="artifacts", help="The store: what is in it, whether it is whole, what to keep.", result_action="return_value"
)
app.command(artifacts)

Tokens = Annotated[str, Parameter(show=False, allow_leading_hyphen=True)]
Name = Annotated[str, Parameter(allow_leading_hyphen=True, show_default=False)]
Store = Annotated[str, Parameter(help="The store: a path, s3://, gs:// or az:// URI.")]
TrackingUri = Annotated[
    str | None, Parameter(help="MLflow's tracking URI; a sqlite file inside the store if not given.")
]
AsJson = Annotated[bool, Parameter(name="--json", negative=(), help="Print one JSON document and nothing else.")]

HELP = ("--help", "-h")

COMMON: dict[str, tuple[Any, Any]] = {
    "params": (
        Annotated[Path | None, Parameter(help="A YAML file of the workflow's parameters; options override it.")],
        None,
    ),
    "store": (Store, "./.stillhouse"),
    "address": (
        Annotated[str | None, Parameter(help="HOST:PORT of a Ray cluster's head; this machine if not given.")],
        None,
    ),
    "only": (Annotated[str | None, Parameter(help="This step and what it needs.")], None),
    "strict_code": (
        Annotated[bool, Parameter(negative=(), help="A found result whose stage's code changed since is made again.")],
        False,
    ),
    "json": (AsJson, False),
}
RUN_ONLY: dict[str, tuple[Any, Any]] = {
    "tracking_uri": (TrackingUri, None),
    "verbose": (Annotated[bool, Parameter(negative=(), help="Let Ray's and the workers' own output through.")], False),
}


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
        return _fail("ConfigError", "; ".join(sentence(problem) for problem in error.errors()), WRONG, as_json)
    except CycloptsError as error:
        return _fail("ConfigError", plain(str(error)), WRONG, as_json)
    except ConfigError as error:
        return _fail(type(error).__name__, str(error), WRONG, as_json)
    except StillhouseError as error:
        return _fail(type(error).__name__, str(error), FAILED, as_json)
    except KeyboardInterrupt:
        return _fail("Interrupted", "interrupted; run the same command again to go on", INTERRUPTED, as_json)
    return result if isinstance(result, int) else OK


def _console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """Return a console that fits the terminal; a file or pipe gets lines of a fixed width."""
    console = Console(stderr=stderr, quiet=quiet)
    return console if console.is_terminal else Console(stderr=stderr, quiet=quiet, width=PIPE_COLUMNS)


def _fail(kind: str, message: str, code: int, as_json: bool) -> int:
    if as_json:
        _print_json({"error": {"kind": kind, "message": message}, "exit_code": code})
    else:
        _console(stderr=True).print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)
    return code


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=1) + "\n")


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
    return with_parameters("run", find_workflow(workflow), tokens, {**COMMON, **RUN_ONLY}, act)


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
    graph, as_json = found.build(**parameters), options["json"]
    settings = _settings(options)
    console = _console(stderr=as_json, quiet=as_json)
    with interruptible(
        lambda: console.print("\n[yellow]stopping; press Ctrl-C again to leave at once[/]")
    ) as interrupt:
        execution = execute(
            graph,
            settings,
            watch=lambda plan: watching(console, plan),
            interrupt=interrupt,
            params=changed_parameters(found, parameters),
            command=shlex.join(["stillhouse", "run", label, *tokens]),
            by_value=found.by_value,
        )
    if as_json:
        _print_json(execution_json(execution))
    else:
        print_outcome(console, execution, store=options["store"], tracking_uri=options["tracking_uri"])
    return OK if execution.result.succeeded else INTERRUPTED if execution.result.interrupted else FAILED


def _plan(
    found: FoundWorkflow, parameters: Mapping[str, Any], options: Mapping[str, Any], tokens: Sequence[str]
) -> int:
    planned = plan_only(found.build(**parameters), _settings(options))
    if options["json"]:
        _print_json(plan_json(planned))
    else:
        console = _console()
        console.print(plan_table(planned))
        console.print(plan_summary(planned), highlight=False)
    return OK


def _settings(options: Mapping[str, Any]) -> Settings:
    return Settings(
        **{
            name: options[name]
            for name in ("store", "tracking_uri", "address", "only", "strict_code", "verbose")
            if name in options
        }
    )


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
            "name": c["name"],
            "artifact": c["uri"],
            "metrics": c["metrics"],
            "params": c["params"],
            "notes": c.get("notes", {}),
        }
        for report in reports
        for c in report["candidates"]
    ]
    return {
        "run": result.run,
        "outcome": "succeeded" if result.succeeded else "interrupted" if result.interrupted else "failed",
        "executed": result.executed,
        "steps": steps,
        "candidates": candidates,
        "verdict": reports[-1]["verdict"] if reports else None,
        "seconds": round(execution.seconds, 3),
        "tracking_uri": execution.tracking_uri,
    }


# what there is ------------------------------------------------------------------------------------------------------


@app.command
def workflows(*, json: AsJson = False) -> int:
    """List the workflows that come with stillhouse."""
    described = {name: (find_workflow(name).build.__doc__ or "").strip().split("\n")[0] for name in workflow_names()}
    if json:
        _print_json({"workflows": [{"name": name, "summary": summary} for name, summary in described.items()]})
        return OK
    console = _console()
    for name, summary in described.items():
        console.print(f"[bold]{name:12}[/] {summary}")
    console.print("\nparameters: stillhouse run WORKFLOW --help · a file of your own: stillhouse init DIR", style="dim")
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
    graph: Workflow = found.build(**parameters)
    answer = inspect_store.explain(graph, options["store"], step, against=options["against"])
    if options["json"]:
        _print_json(answer)
    else:
        _print_fields(answer)
    return OK


@app.command
def init(folder: Path) -> int:
    """Write a commented workflow file to start from, that runs.

    Args:
        folder: made if it is missing; nothing in it is overwritten.
    """
    from workflows import starter

    path = starter.write(folder)
    _console().print(f"wrote {path}; run it: stillhouse run {path}", highlight=False, soft_wrap=True)
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
    from workflows.doctor import examine

    findings = examine(Settings(store=store, tracking_uri=tracking_uri, address=address))
    if json:
        _print_json({"findings": [finding.to_json() for finding in findings]})
    else:
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        for finding in findings:
            mark, style = {"fine": ("✓", "green"), "note": ("·", "dim"), "wrong": ("✗", "bold red")}[finding.state]
            table.add_row(
                Text(mark, style=style),
                finding.subject,
                finding.text + (f"\n→ {finding.remedy}" if finding.remedy else ""),
            )
        _console().print(table)
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
        _print_json({"candidates": rows})
    else:
        inspect_store.print_comparison(_console(), rows)
    return OK


@app.command
def ui(*, store: Store = "./.stillhouse", tracking_uri: TrackingUri = None, port: int = 5000) -> int:
    """Serve the MLflow UI on the store's tracking database, on this machine only.

    Args:
        store: the store.
        tracking_uri: MLflow's tracking URI.
        port: on 127.0.0.1.
    """
    return inspect_store.serve_ui(Settings(store=store, tracking_uri=tracking_uri), port, _console())


# the store ----------------------------------------------------------------------------------------------------------


@artifacts.command(name="list")
def list_artifacts(*, store: Store = "./.stillhouse", json: AsJson = False) -> int:
    """List the artifacts: kind, step, size, when they were made.

    Args:
        store: the store.
        json: print one JSON document and nothing else.
    """
    rows = inspect_store.list_artifacts(store)
    if json:
        _print_json({"artifacts": rows})
    else:
        inspect_store.print_artifacts(_console(), rows)
    return OK


@artifacts.command
def show(artifact: str, *, store: Store = "./.stillhouse", json: AsJson = False) -> int:
    """Show an artifact: files, metrics, lineage, and the folder to load a checkpoint from.

    Args:
        artifact: the first digits of a fingerprint, or WORKFLOW/STEP.
        store: the store.
        json: print one JSON document and nothing else.
    """
    answer = inspect_store.show(store, artifact)
    if json:
        _print_json(answer)
    else:
        _print_fields(answer)
    return OK


@artifacts.command
def verify(*which: str, store: Store = "./.stillhouse", json: AsJson = False) -> int:
    """Hash files again and compare them with their manifests.

    What does not verify is withdrawn, and made again by the next run.

    Args:
        which: fingerprints or WORKFLOW/STEP; all if none is given.
        store: the store.
        json: print one JSON document and nothing else.
    """
    rows = inspect_store.verify(store, which)
    rotten = [row for row in rows if row["problems"]]
    if json:
        _print_json({"artifacts": rows})
    else:
        console = _console()
        for row in rotten:
            console.print(
                Text(
                    f"✗ {row['fingerprint'][:12]} {row['step']}: {'; '.join(row['problems'])}; withdrawn",
                    style="bold red",
                ),
                soft_wrap=True,
            )
        console.print(f"{len(rows) - len(rotten)} artifacts verify, {len(rotten)} do not", highlight=False)
    return FAILED if rotten else OK


@artifacts.command
def pin(artifact: str, *, note: str = "", store: Store = "./.stillhouse") -> int:
    """Keep an artifact and what it was made from, whatever `gc` would say.

    Args:
        artifact: the first digits of a fingerprint, or WORKFLOW/STEP.
        note: why.
        store: the store.
    """
    fingerprint = inspect_store.pin(store, artifact, note)
    _console().print(f"pinned {fingerprint[:12]}", highlight=False)
    return OK


@artifacts.command
def gc(
    *,
    keep_runs: int = 5,
    yes: bool = False,
    store: Store = "./.stillhouse",
    tracking_uri: TrackingUri = None,
    json: AsJson = False,
) -> int:
    """Collect what no pinned artifact, kept run or registered version reaches. Only tells, unless `--yes`.

    Args:
        keep_runs: keep what the newest so many runs used.
        yes: delete.
        store: the store.
        tracking_uri: MLflow's tracking URI.
        json: print one JSON document and nothing else.
    """
    answer = inspect_store.collect(Settings(store=store, tracking_uri=tracking_uri), keep_runs=keep_runs, delete=yes)
    if json:
        _print_json(answer)
    else:
        inspect_store.print_collected(_console(), answer)
    return OK


def _print_fields(answer: Mapping[str, Any]) -> None:
    from rich.pretty import Pretty

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in answer.items():
        table.add_row(name, value if isinstance(value, str) else Pretty(value, expand_all=False))
    _console().print(table)


if __name__ == "__main__":
    main()
