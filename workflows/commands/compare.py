"""`stillhouse compare`: the leaderboard out of MLflow."""

from stages.formats.metrics import droppable_labels, known_columns
from workflows.commands.find import find_run, find_store
from workflows.commands.options import DEFAULT_STORE, Json, Store, TrackingUri
from workflows.commands.output import console, print_json, print_table, say
from workflows.engine.run import Settings
from workflows.engine.store import ArtifactStore
from workflows.engine.tracking.queries import query_candidates


def compare(*runs: str, store: Store = DEFAULT_STORE, tracking_uri: TrackingUri = None, json: Json = False) -> None:
    """Show the leaderboard out of MLflow: of some runs, or of all.

    Args:
        runs: run ids.
    """
    opened = ArtifactStore(store) if tracking_uri else find_store(store)
    rows = query_candidates(Settings(store, tracking_uri).tracking(opened), run_ids=list(runs) or None)
    known = {run for row in rows for run in row["runs"]}
    for run in runs:
        if run not in known:
            find_run(opened, run)  # there is such a run, though it judged no candidate
    rows.sort(key=lambda row: (row["experiment"], row["metrics"].get("final/size_bytes", 0.0)))
    if json:
        print_json({"candidates": rows})
    elif not rows:
        say("no candidates yet: run a workflow that ends with Promote, e.g. `stillhouse run quickstart`")
    else:
        columns = known_columns(row["metrics"] for row in rows)
        headings = ["candidate", *(column.label for column in columns)]
        cells = [[row["name"], *(column.cell(row["metrics"]) for column in columns)] for row in rows]
        print_table(console(), headings, cells, droppable=droppable_labels())
