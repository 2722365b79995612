"""The page of MLflow's UI on which an experiment's candidates stand side by side, saved as a tag of the experiment."""

import json

from stages.formats.metrics import METRICS, PRIMARY_METRIC

CANDIDATES_PATH = "#/experiments/{experiment_id}/runs?viewStateShareKey=candidates"
"""Where MLflow's UI shows an experiment's candidates side by side; with `&compareRunsMode=CHART` as charts."""
VIEW = "mlflow.sharedViewState.candidates"
"""Experiment tag in which MLflow's UI looks for the columns, filter and order of that page."""


def view_state() -> str:
    """Return the state of MLflow's run table in which the candidates stand side by side, best first."""
    shown = [metric for metric in METRICS if metric.column is not None]
    # A screen shows about five columns: what the rows are ordered by first, then those that the tables never drop.
    shown.sort(key=lambda metric: (metric.name != PRIMARY_METRIC, metric.column))
    columns = [f"metrics.`{metric.name}`" for metric in shown]
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
