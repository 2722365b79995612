"""The page of MLflow's UI on which an experiment's candidates stand side by side, saved as a tag of the experiment."""

import json

__all__ = ["CANDIDATES_PATH", "PRIMARY_METRIC", "VIEW", "view_state"]

PRIMARY_METRIC = "final/kl_to_teacher"
CANDIDATES_PATH = "#/experiments/{experiment_id}/runs?viewStateShareKey=candidates"
"""Where MLflow's UI shows an experiment's candidates side by side; with `&compareRunsMode=CHART` as charts."""
VIEW = "mlflow.sharedViewState.candidates"
"""Experiment tag in which MLflow's UI looks for the columns, filter and order of that page."""
COLUMNS = (
    "final/kl_to_teacher",
    "final/agreement",
    "final/perplexity",
    "final/size_bytes",
    "final/compression_x",
    "final/bits_per_weight",
    "final/latency_p50_ms",
    "final/tokens_per_second",
    "final/peak_memory_bytes",
    "final/cost_seconds",
)
"""The candidates' figures that a reader sees without choosing columns."""


def view_state() -> str:
    """Return the state of MLflow's run table in which the candidates stand side by side, best first."""
    columns = [f"metrics.`{name}`" for name in COLUMNS]
    return json.dumps(
        {
            "searchFilter": "tags.kind = 'candidate'",
            "orderByKey": f"metrics.`{PRIMARY_METRIC}`",
            "orderByAsc": True,
            "startTime": "ALL",
            "lifecycleFilter": "Active",
            "modelVersionFilter": "All Runs",
            "datasetsFilter": [],
            "selectedColumns": ["attributes.`Models`", *columns],
            "columnOrder": columns,
            "columnWidths": dict.fromkeys(columns, 150),
        }
    )
