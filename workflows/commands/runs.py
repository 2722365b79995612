"""`stillhouse runs`: what the store keeps of earlier runs, listed, or published to MLflow anew."""

import time

from cyclopts import App
from rich.table import Table

from workflows.commands.find import find_store
from workflows.commands.options import OK, OutputOptions, StoreOptions, TrackingOptions
from workflows.commands.output import console, print_json, say
from workflows.engine.events import EventLog
from workflows.engine.tracking.publisher import publish_history
from workflows.engine.tracking.view import fold

runs = App(name="runs", help="List earlier runs, and publish them to MLflow anew.")


@runs.command(name="list")
def list_runs(*, at: StoreOptions = StoreOptions(), output: OutputOptions = OutputOptions()) -> int:
    """List the runs that the store keeps, the newest last."""
    store = find_store(at.store)
    rows = []
    for run in (store.root / "runs").children():
        events = EventLog(store.root / "runs" / run / "events").read_all()
        if not events:
            continue
        top = fold(events, over=not store.liveness.run_alive(run)).rows[0]
        began = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(top.started_ms / 1000))
        rows.append({"run": run, "status": top.status, "workflow": top.tags["workflow"], "began": began})
    if output.json:
        print_json({"runs": rows})
        return OK
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("run", "status", "workflow", "began"):
        table.add_column(name)
    for row in rows:
        table.add_row(*row.values())
    console().print(table)
    return OK


@runs.command
def publish(*names: str, at: TrackingOptions = TrackingOptions(), output: OutputOptions = OutputOptions()) -> int:
    """Publish runs to MLflow as the store remembers them, also to an empty one; again changes nothing.

    Args:
        names: run ids; all of the store's runs where none is given.
    """
    store = find_store(at.store)
    root, uri = store.root.uri_of("mlflow/artifacts"), at.settings.tracking(store)
    published = publish_history(store.root / "runs", names, tracking_uri=uri, artifact_root=root)
    if output.json:
        print_json({"published": published})
    else:
        say(f"published {len(published)} run{'s' if len(published) != 1 else ''}: {', '.join(published) or 'none'}")
    return OK
