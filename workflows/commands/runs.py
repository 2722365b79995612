"""`stillhouse runs`: what the store keeps of earlier runs, listed, or published to MLflow anew."""

import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from cyclopts import App

from workflows.commands.find import find_store
from workflows.commands.options import DEFAULT_STORE, FAILED, OK, Json, Store, TrackingUri
from workflows.commands.output import console, print_json, print_table, say
from workflows.engine.events import READS_AT_ONCE, EventLog
from workflows.engine.run import Settings
from workflows.engine.store import ArtifactStore
from workflows.engine.tracking.publisher import publish_history
from workflows.engine.tracking.view import fold

runs = App(name="runs", help="List earlier runs, and publish them to MLflow anew.")


@runs.command(name="list")
def list_runs(*, store: Store = DEFAULT_STORE, json: Json = False) -> None:
    """List the runs that the store keeps, the newest last."""
    opened = find_store(store)
    with ThreadPoolExecutor(READS_AT_ONCE) as pool:
        found = pool.map(partial(_describe, opened), (opened.root / "runs").children())
        rows = [row for row in found if row is not None]
    if json:
        print_json({"runs": rows})
    elif not rows:
        say("no runs yet: start one, e.g. `stillhouse run quickstart`")
    else:
        print_table(console(), list(rows[0]), [list(row.values()) for row in rows])


def _describe(store: ArtifactStore, run: str) -> dict[str, str] | None:
    """Return what a run is, by the first and the last of its events; None where it recorded nothing."""
    events = EventLog(store.root / "runs" / run / "events").read_ends()
    if events is None:
        return None
    try:
        top = fold(events, over=not store.liveness.run_alive(run)).rows[0]
    except ValueError:  # a power cut tore its first events
        return {"run": run, "status": "UNREADABLE", "workflow": "", "began": ""}
    began = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(top.started_ms / 1000))
    return {"run": run, "status": top.status, "workflow": top.tags["workflow"], "began": began}


@runs.command
def publish(*names: str, store: Store = DEFAULT_STORE, tracking_uri: TrackingUri = None, json: Json = False) -> int:
    """Publish runs to MLflow as the store remembers them, also to an empty one; again changes nothing.

    Args:
        names: run ids; all of the store's runs where none is given.
    """
    opened = find_store(store)
    root, uri = opened.root.uri_of("mlflow/artifacts"), Settings(store, tracking_uri).tracking(opened)
    found = publish_history(opened.root / "runs", names, tracking_uri=uri, artifact_root=root)
    published = [run.run for run in found if run.published]
    left_out = [run.run for run in found if run.state == "held"]
    failed = {run.run: run.error for run in found if run.state == "failed"}
    if json:
        print_json({"published": published, "left_out": left_out, "failed": failed})
    else:
        say(f"published {len(published)} run{'s' if len(published) != 1 else ''}: {', '.join(published) or 'none'}")
        if left_out:
            say(f"left out, since another process publishes them at this moment: {', '.join(left_out)}")
        for run, error in failed.items():
            say(f"{run} could not be published: {error}")
    return FAILED if failed else OK
