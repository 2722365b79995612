"""Reads back what MLflow shows: the candidates, and which fingerprints the registry names."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from workflows.engine.redaction import redacted
from workflows.engine.tracking.connection import connect, pages
from workflows.engine.tracking.tracking_uri import TrackingUnavailable, sqlite_path
from workflows.engine.tracking.view import RUN


@contextmanager
def _client(tracking_uri: str) -> Iterator[Any]:
    """Yield a client for reading.

    Raises:
        TrackingUnavailable: there is no MLflow there, or it does not answer what it is asked.
    """
    path = sqlite_path(tracking_uri)
    if path is not None and path.is_absolute() and not path.exists():
        raise TrackingUnavailable(
            f"there is no MLflow database at {path} yet; run a workflow, or pass the tracking URI that its runs use"
        )
    client = connect(tracking_uri)
    try:
        yield client
    except Exception as error:
        problem = f"MLflow at {tracking_uri} cannot be asked ({error})"
        raise TrackingUnavailable(redacted(problem)) from error


def query_candidates(tracking_uri: str, *, run_ids: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Return the candidates in MLflow, or those that one of some runs has, as plain values, by experiment and name.

    Raises:
        TrackingUnavailable: MLflow cannot be asked.
    """
    with _client(tracking_uri) as client:
        names = {e.experiment_id: e.name for e in pages(lambda token: client.search_experiments(page_token=token))}
        where = "tags.kind = 'candidate'"
        runs = pages(lambda token: client.search_runs(list(names), where, page_token=token)) if names else ()
        rows = [_candidate(run, names[run.info.experiment_id]) for run in runs]
    wanted = [row for row in rows if run_ids is None or set(run_ids) & set(row["runs"])]
    return sorted(wanted, key=lambda row: (row["experiment"], row["name"], row["at_ms"]))


def _candidate(run: Any, experiment: str) -> dict[str, Any]:
    tags = run.data.tags
    return {
        "name": tags["candidate"],
        "scores": tags["scores"],
        "artifact": tags["artifact"],
        "fingerprint": tags.get("fingerprint"),
        "experiment": experiment,
        "experiment_id": run.info.experiment_id,
        "mlflow_run_id": run.info.run_id,
        "at_ms": run.info.start_time,
        "runs": sorted(name.removeprefix(f"{RUN}.") for name in tags if name.startswith(f"{RUN}.")),
        "params": dict(run.data.params),
        "metrics": dict(run.data.metrics),
        "tags": dict(tags),
    }


def registered_fingerprints(tracking_uri: str) -> set[str]:
    """Return the fingerprints of the models in the registry, and of the scores that they were judged by.

    Raises:
        TrackingUnavailable: the registry cannot be asked; nothing may be collected then.
    """
    with _client(tracking_uri) as client:
        versions = list(pages(lambda token: client.search_model_versions(max_results=1000, page_token=token)))
    tags = [version.tags.get(tag, "") for version in versions for tag in ("fingerprint", "scores", "artifact")]
    return {fingerprint for tag in tags for fingerprint in re.findall(r"\b[0-9a-f]{64}\b", tag)}
