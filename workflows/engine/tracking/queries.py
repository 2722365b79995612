"""Reads back what the ledger told MLflow: the candidates, and which fingerprints the registry names."""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from workflows.engine.redaction import redacted
from workflows.engine.tracking.connection import connect
from workflows.engine.tracking.tracking_uri import TrackingUnavailable, sqlite_path
from workflows.engine.tracking.view import RUN

__all__ = ["read_candidates", "registered_fingerprints"]


def _ask(tracking_uri: str) -> Any:
    """Return a client for reading; raise `TrackingUnavailable` where there is no ledger."""
    path = sqlite_path(tracking_uri)
    if path is not None and path.is_absolute() and not path.exists():
        raise TrackingUnavailable(
            f"there is no ledger at {path} yet; run a workflow, or pass the tracking URI that its runs use"
        )
    return connect(tracking_uri, "").client


def _pages(search: Callable[[str | None], Any]) -> Iterable[Any]:
    token: str | None = None
    while True:
        page = search(token)
        yield from page
        token = page.token
        if not token:
            return


def read_candidates(
    tracking_uri: str, *, run_ids: Sequence[str] | None = None, experiment: str | None = None
) -> list[dict[str, Any]]:
    """Return the candidates in the ledger, each as plain values, by experiment and name.

    Args:
        tracking_uri: MLflow's.
        run_ids: only candidates that one of these runs has.
        experiment: only those of this experiment.

    Raises:
        TrackingUnavailable: MLflow cannot be asked.
    """
    client = _ask(tracking_uri)
    try:
        experiments = {
            e.experiment_id: e.name for e in _pages(lambda token: client.search_experiments(page_token=token))
        }
        chosen = [key for key, name in experiments.items() if experiment in (None, name)]
        found = (
            []
            if not chosen
            else list(_pages(lambda token: client.search_runs(chosen, "tags.kind = 'candidate'", page_token=token)))
        )
    except Exception as error:
        raise TrackingUnavailable(
            f"MLflow at {redacted(tracking_uri)} cannot be asked ({redacted(str(error))})"
        ) from error
    rows = [_candidate(run, experiments[run.info.experiment_id]) for run in found]
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
    client = _ask(tracking_uri)
    try:
        versions = list(_pages(lambda token: client.search_model_versions(max_results=1000, page_token=token)))
    except Exception as error:
        raise TrackingUnavailable(
            f"the registry at {redacted(tracking_uri)} cannot be asked ({redacted(str(error))})"
        ) from error
    named = {version.tags.get(tag) for version in versions for tag in ("fingerprint", "scores")}
    paths = {part for version in versions for part in re.findall(r"\b[0-9a-f]{64}\b", version.tags.get("artifact", ""))}
    return {fingerprint for fingerprint in named if fingerprint} | paths
