"""`stillhouse compare`: the leaderboard out of MLflow."""

from collections.abc import Mapping

from workflows.commands.find import find_run, find_store
from workflows.commands.formatting import fitting_table
from workflows.commands.options import OK, OutputOptions, TrackingOptions
from workflows.commands.output import console, print_json, say
from workflows.engine.store import ArtifactStore
from workflows.engine.tracking.queries import read_candidates

COLUMNS = (
    ("final/perplexity", "perplexity", "{:.2f}"),
    ("final/kl_to_teacher", "KL to teacher", "{:.4f}"),
    ("final/agreement", "agreement", "{:.1%}"),
    ("final/size_bytes", "size, MB", "{:.2f}"),
    ("final/compression_x", "compression", "{:.1f}×"),
    ("final/bits_per_weight", "bits/weight", "{:.2f}"),
    ("final/latency_p50_ms", "decode p50, ms", "{:.2f}"),
    ("final/tokens_per_second", "tokens/s", "{:,.0f}"),
    ("final/cost_seconds", "cost, s", "{:,.0f}"),
)
"""Metric, heading, format."""
NARROW = ("bits/weight", "tokens/s", "cost, s", "compression", "decode p50, ms")
"""The columns that a narrow terminal leaves out, the first first."""


def compare(*runs: str, at: TrackingOptions = TrackingOptions(), output: OutputOptions = OutputOptions()) -> int:
    """Show the leaderboard out of MLflow: of some runs, or of all.

    Args:
        runs: run ids.
    """
    store = ArtifactStore(at.store) if at.tracking_uri else find_store(at.store)
    rows = read_candidates(at.settings.tracking(store), run_ids=list(runs) or None)
    known = {run for row in rows for run in row["runs"]}
    for run in runs:
        if run not in known:
            find_run(store, run)  # there is such a run, though it judged no candidate
    rows.sort(key=lambda row: (row["experiment"], row["metrics"].get("final/size_bytes", 0.0)))
    if output.json:
        print_json({"candidates": rows})
    elif not rows:
        say("no candidates yet: run a workflow that ends with Promote, e.g. `stillhouse run quickstart`")
    else:
        out = console()
        headings = ["candidate", *(heading for _, heading, _ in COLUMNS)]
        cells = [[row["name"], *(_cell(metric, form, row["metrics"]) for metric, _, form in COLUMNS)] for row in rows]
        out.print(fitting_table(headings, cells, width=out.width, droppable=NARROW))
    return OK


def _cell(metric: str, form: str, metrics: Mapping[str, float]) -> str:
    if metric not in metrics:
        return "–"
    value = metrics[metric]
    return form.format(value / 1e6 if metric == "final/size_bytes" else value)
