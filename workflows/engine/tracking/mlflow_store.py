"""Writes the ledger's entries to MLflow: runs, steps, candidates, the registry; it is handed the connection.

Promises: each call may be repeated after it failed anywhere, and leaves the same ledger as one that went through. Each
MLflow run bears a key that is searched before it is made (unless this process knows that it is new); points are told
with their record's time, so that MLflow keeps them once. Does not: batch, retry or remember over a restart.

MLflow is addressed by explicit run ids only: a "current run" would leak between tasks of one process.
"""

import logging
import re
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from stages.storage import Folder
from workflows.engine.events import CandidateFound, RunEvent, RunOpened, VerdictReached
from workflows.engine.tracking.connection import Connection
from workflows.engine.tracking.ui_view import PRIMARY_METRIC, VIEW, view
from workflows.engine.tracking.view import (
    KEY,
    RUN,
    SHORT_FINGERPRINT,
    Entry,
    Row,
    candidate_key,
    finite,
    legal_name,
    legal_params,
    legal_tags,
    seen_by,
)

__all__ = ["MlflowStore"]

logger = logging.getLogger(__name__)

CHAMPION = "champion"
REACHABLE = ("", "file", "s3", "gs", "az")
"""Schemes of artifact URIs that are written without MLflow; a server that keeps them has `mlflow-artifacts:/…`."""


class MlflowStore:
    """Writes entries to MLflow. Each method may be called again after it failed anywhere: the result is the same."""

    def __init__(self, mlflow: Connection, *, careful: bool = False) -> None:
        """Open the books that a connection leads to."""
        self._mlflow, self._client = mlflow, mlflow.client
        self.careful = careful
        """Look for an MLflow run before making it: after a failure, and whenever a journal is replayed."""
        self._opened: dict[str, RunOpened] = {}
        self._experiments: dict[str, str] = {}
        self._runs: dict[str, tuple[str, str]] = {}
        """key → (MLflow run id, artifact URI)."""

    def meet(self, records: Iterable[RunEvent]) -> None:
        """Learn to which experiment the records' runs belong."""
        self._opened |= {record.run: record for record in records if isinstance(record, RunOpened)}

    def tell(self, entry: Entry) -> None:
        """Write one entry."""
        match entry:
            case Row():
                self._tell_row(entry)
            case CandidateFound():
                self._tell_candidate(entry)
            case VerdictReached():
                self._tell_verdict(entry)

    def settle(self, run: str, at_ms: int) -> None:
        """End as KILLED what a dead run has left RUNNING."""
        where = f"tags.`{RUN}` = '{legal_name(run)}' and attributes.status = 'RUNNING'"
        for found in self._client.search_runs([self._experiment(run)], where):
            self._client.set_terminated(found.info.run_id, "KILLED", max(at_ms, found.info.start_time))

    # Runs and steps -------------------------------------------------------------------------------------------------

    def _tell_row(self, row: Row) -> None:
        tags = dict(row.tags)
        if row.key not in self._runs:
            if row.parent is not None:
                tags["mlflow.parentRunId"] = self._run_id(row.run)
            started = row.opened_ms or (row.closed[1] if row.closed else int(time.time() * 1000))
            found = self._find(row.run, row.key) if self.careful or row.opened_ms is None else None
            if found is None:
                found = self._create(row.run, row.key, row.name, tags, started)
                tags = {}
            self._runs[row.key] = (found.info.run_id, found.info.artifact_uri)
        run_id, artifacts = self._runs[row.key]
        if row.points or row.params or tags:
            self._mlflow.log(run_id, points=row.points, params=row.params, tags=tags)
        for name, text in row.texts.items():
            self._put(run_id, artifacts, name, text.encode())
        for name, data in _read_files(row.files):
            self._put(run_id, artifacts, name, data)
        if row.closed is not None:
            self._client.set_terminated(run_id, *row.closed)

    def _run_id(self, key: str) -> str:
        """Return the id of the MLflow run of a workflow run."""
        if key not in self._runs:
            found = self._find(key, key)
            if found is None:  # its row was refused; the steps must hang somewhere
                found = self._create(key, key, key, {"kind": "workflow", RUN: key}, self._opened[key].at_ms)
            self._runs[key] = (found.info.run_id, found.info.artifact_uri)
        return self._runs[key][0]

    def _find(self, run: str, key: str) -> Any:
        """Return the MLflow run that bears a key, if any. Of several, made by writers that raced, one stays."""
        where = f"tags.`{KEY}` = '{legal_name(key)}'"
        found = self._client.search_runs([self._experiment(run)], where)
        found = sorted(found, key=lambda item: (item.info.start_time, item.info.run_id))
        for extra in found[1:]:
            self._client.delete_run(extra.info.run_id)
        return found[0] if found else None

    def _create(self, run: str, key: str, name: str, tags: Mapping[str, str], at_ms: int) -> Any:
        tags = {**tags, KEY: legal_name(key)}
        return self._client.create_run(self._experiment(run), start_time=at_ms, tags=tags, run_name=name[:250])

    def _experiment(self, run: str) -> str:
        """Return the id of a run's experiment, made where it is missing."""
        if run not in self._opened:
            raise ValueError(f"the journal of run {run} does not say how it began")
        name = self._opened[run].experiment
        if name not in self._experiments:
            self._experiments[name] = self._find_experiment(name) or self._make_experiment(name)
        return self._experiments[name]

    def _find_experiment(self, name: str) -> str | None:
        found = self._client.get_experiment_by_name(name)
        if found is None:
            return None
        if found.lifecycle_stage == "deleted":
            self._client.restore_experiment(found.experiment_id)
        if found.tags.get(VIEW) != view():
            self._client.set_experiment_tag(found.experiment_id, VIEW, view())
        return str(found.experiment_id)

    def _make_experiment(self, name: str) -> str:
        tags = {
            "mlflow.experimentKind": "custom_model_development",
            "mlflow.experiment.primaryMetric.name": PRIMARY_METRIC,
            "mlflow.experiment.primaryMetric.greaterIsBetter": "false",
            VIEW: view(),
        }
        root = self._mlflow.artifact_location
        location = root and f"{root}/{re.sub(r'[^A-Za-z0-9._-]+', '-', name)}"
        try:
            return str(self._client.create_experiment(name, artifact_location=location, tags=tags))
        except Exception:  # a driver that raced us made it, or MLflow is down, which asking again tells
            found = self._find_experiment(name)
            if found is None:
                raise
            return found

    def _put(self, run_id: str, artifacts: str, name: str, data: bytes) -> None:
        """Write a small artifact: where it lies if that can be reached (0.2 ms, not 4), else by the client."""
        if urlsplit(artifacts).scheme in REACHABLE:
            Folder.at(artifacts).put(name, data)
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, name.rpartition("/")[2])
            path.write_bytes(data)
            self._client.log_artifact(run_id, str(path), name.rpartition("/")[0] or None)

    # Candidates -----------------------------------------------------------------------------------------------------

    def _tell_candidate(self, record: CandidateFound) -> None:
        """Make or complete the one flat MLflow run of a candidate and its logged model, and tag them with this run."""
        key = candidate_key(record.scores, record.name)
        points, odd = finite((name, value, 0, record.at_ms) for name, value in record.metrics.items())
        params, tags = legal_params(record.params), legal_tags(_candidate_tags(record, self._opened[record.run])) | odd
        found = self._find(record.run, key)
        if found is None:
            self._create(record.run, key, record.name, tags, record.at_ms)
            found = self._find(record.run, key)  # another driver may have made it at the same moment
        run_id, shown = found.info.run_id, found.data
        if int(shown.tags.get("stillhouse.seen_ms", 0)) > record.at_ms:  # a journal that is replayed late
            tags = {name: value for name, value in tags.items() if name not in ("run", "stillhouse.seen_ms")}
        model = self._model_of(record, found, key, params, tags)
        of_model = {metric.key: metric.value for metric in model.metrics or []}
        new = [p for p in points if shown.metrics.get(p[0]) != p[1] or of_model.get(p[0]) != p[1]]
        self._mlflow.log(
            run_id,
            points=new,
            params={name: value for name, value in params.items() if name not in shown.params},
            tags={name: value for name, value in tags.items() if shown.tags.get(name) != value},
            model_id=model.model_id,
        )
        missing = {name: value for name, value in tags.items() if model.tags.get(name) != value}
        if missing:
            self._client.set_logged_model_tags(model.model_id, missing)
        if found.info.status == "RUNNING":
            self._client.set_terminated(run_id, "FINISHED", record.at_ms)

    def _model_of(
        self, record: CandidateFound, found: Any, key: str, params: Mapping[str, str], tags: Mapping[str, str]
    ) -> Any:
        """Return the logged model of a candidate, made and linked to its MLflow run where it is missing."""
        linked = [output.model_id for output in (found.outputs.model_outputs if found.outputs else [])]
        if linked:
            return self._client.get_logged_model(linked[0])
        experiment = self._experiment(record.run)
        models = self._client.search_logged_models([experiment], f"tags.`{KEY}` = '{key}'")
        if models:
            model = min(models, key=lambda item: (item.creation_timestamp, item.model_id))
        else:
            model = self._client.create_logged_model(
                experiment,
                name=re.sub(r"[/:.%\"']", "-", record.name),
                source_run_id=found.info.run_id,
                tags={**tags, KEY: key, "mlflow.model.isExternal": "true"},
                params=dict(params),
                model_type="candidate",
            )
        if str(model.status) != "READY":
            self._client.finalize_logged_model(model.model_id, "READY")
        self._mlflow.link(found.info.run_id, model.model_id)
        return model

    # The registry ---------------------------------------------------------------------------------------------------

    def _tell_verdict(self, record: VerdictReached) -> None:
        verdict = {
            "verdict": f"champion: {record.champion}" if record.champion else "rejected",
            "verdict.reasons": "\n".join(record.reasons),
        }
        self._mlflow.log(self._run_id(record.run), params={}, tags=legal_tags(verdict))
        if record.champion is None:
            return
        key = candidate_key(record.scores, record.champion)
        found = self._find(record.run, key)
        if found is None or not (found.outputs and found.outputs.model_outputs):
            raise ValueError(
                f"the verdict of run {record.run} names the candidate {record.champion!r}, which was never found"
            )
        name = re.sub(r"[/:]", "-", record.registered_name)
        registered = self._registered_model(name)
        version = self._version(name, key, found)
        if int(registered.tags.get("stillhouse.decided_ms", 0)) > record.at_ms:  # a later verdict stands already
            return
        before = registered.aliases.get(CHAMPION)
        if before is None or str(before) != version:
            if before is not None:
                self._client.set_model_version_tag(name, version, "replaced_version", str(before))
            self._client.set_registered_model_alias(name, CHAMPION, version)
        self._client.set_registered_model_tag(name, "stillhouse.decided_ms", str(record.at_ms))

    def _registered_model(self, name: str) -> Any:
        found = self._client.search_registered_models(f"name = '{name}'")
        if not found:
            try:
                self._client.create_registered_model(
                    name, description=f"Its alias `{CHAMPION}` follows the verdicts of stillhouse."
                )
            except Exception as error:
                if getattr(error, "error_code", "") != "RESOURCE_ALREADY_EXISTS":
                    raise
        return self._client.get_registered_model(name)

    def _version(self, name: str, key: str, found: Any) -> str:
        """Return the one version of a candidate, made where it is missing; of several, by racing writers, one stays."""
        versions = self._versions(name, key)
        if not versions:
            self._mlflow.point_globals()  # the sqlite registry looks for the logged model in the global store
            model_id = found.outputs.model_outputs[0].model_id
            copied = ("artifact", "fingerprint", "scores", "candidate", "made_by_run")
            tags = {name: found.data.tags[name] for name in copied if name in found.data.tags}
            self._client.create_model_version(
                name, f"models:/{model_id}", found.info.run_id, tags={**tags, KEY: key}, model_id=model_id
            )
            versions = self._versions(name, key)
        for extra in versions[1:]:
            self._client.delete_model_version(name, str(extra))
        return str(versions[0])

    def _versions(self, name: str, key: str) -> list[int]:
        found = self._client.search_model_versions(f"name = '{name}'", max_results=1000)
        return sorted(int(version.version) for version in found if version.tags.get(KEY) == key)


def _candidate_tags(record: CandidateFound, opened: RunOpened) -> dict[str, str]:
    own = {
        "kind": "candidate",
        "candidate": record.name,
        "workflow": opened.workflow,
        "scores": record.scores,
        "artifact": record.artifact,
        "run": record.run,
        "stillhouse.seen_ms": str(record.at_ms),
        seen_by(record.run): "yes",
        "mlflow.note.content": (
            f"Candidate **{record.name}**, judged by scores `{record.scores[:SHORT_FINGERPRINT]}`. Load it with\n\n"
            f'    AutoModelForCausalLM.from_pretrained("{record.artifact}")'
        ),
    }
    return {**record.tags, **own}


def _read_files(uris: Iterable[str]) -> Iterable[tuple[str, bytes]]:
    taken: set[str] = set()
    for uri in uris:
        parent, _, name = uri.rpartition("/")
        shown = name if name not in taken else f"{len(taken)}/{name}"
        taken.add(shown)
        try:
            yield shown, Folder.at(parent).get(name)
        except FileNotFoundError:
            logger.warning("the ledger leaves out %s, since there is no such file", uri)
