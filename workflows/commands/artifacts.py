"""`stillhouse artifacts …`: the commands about the store."""

from cyclopts import App
from rich.text import Text

from workflows.commands import inspect_store
from workflows.commands.options import FAILED, OK, AsJson, Count, Store, TrackingUri
from workflows.commands.output import console, print_fields, print_json
from workflows.engine.run import Settings

artifacts = App(
    name="artifacts", help="The store: what is in it, whether it is whole, what to keep.", result_action="return_value"
)


@artifacts.command(name="list")
def list_artifacts(*, store: Store = "./.stillhouse", json: AsJson = False) -> int:
    """List the artifacts: kind, step, size, when they were made.

    Args:
        store: the store.
        json: print one JSON document and nothing else.
    """
    rows = inspect_store.list_artifacts(store)
    if json:
        print_json({"artifacts": rows})
    else:
        inspect_store.print_artifacts(console(), rows)
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
        print_json(answer)
    else:
        print_fields(answer)
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
        print_json({"artifacts": rows})
    else:
        out = console()
        for row in rotten:
            out.print(
                Text(
                    f"✗ {row['fingerprint'][:12]} {row['step']}: {'; '.join(row['problems'])}; withdrawn",
                    style="bold red",
                ),
                soft_wrap=True,
            )
        out.print(f"{len(rows) - len(rotten)} artifacts verify, {len(rotten)} do not", highlight=False)
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
    console().print(f"pinned {fingerprint[:12]}", highlight=False)
    return OK


@artifacts.command
def gc(
    *,
    keep_runs: Count = 5,
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
        print_json(answer)
    else:
        inspect_store.print_collected(console(), answer)
    return OK
