"""Upserts the view of a run into MLflow: rows, candidates, the registry; it is handed the client.

Promises: `publish` may be called again after it failed anywhere, and leaves the same as one call that went through:
each MLflow run bears a key by which it is looked for before it is made, and only what MLflow has not acknowledged is
sent. A row gets its status and end last: one that MLflow has with both is whole, whoever published it.
What MLflow will never take is logged and does not hold up the rest.
Does not: retry, or decide what is shown.

MLflow is addressed by explicit run ids only: a "current run" would leak between tasks of one process.
"""

import io
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit

from stages.formats.metrics import PRIMARY_METRIC
from stages.storage import Folder
from workflows.engine.redaction import redacted
from workflows.engine.tracking.connection import batches, connect, is_refusal, link, pages, unless_made_already
from workflows.engine.tracking.tracking_uri import files_left_out, is_server
from workflows.engine.tracking.ui_view import VIEW, view_state
from workflows.engine.tracking.view import KEY, RUN, CandidateRow, Row, RunView, legal_name

logger = logging.getLogger(__name__)

CHAMPION = "champion"
REACHABLE = ("", "file", "s3", "gs", "az")
"""Schemes of artifact URIs that are written without MLflow; a server that keeps them has `mlflow-artifacts:/…`."""


@dataclass(slots=True)
class _Sent:
    """What MLflow has of a row for certain; what it may have beside that is sent again, which changes nothing."""

    run: Any
    """The MLflow run; its params and tags are those that it was sent."""
    num_points: int = 0
    files: set[str] = field(default_factory=set)


@dataclass
class MlflowStore:
    """MLflow, as runs are published to it; connected to once there is something to publish."""

    uri: str
    artifact_root: str
    """Where artifacts lie where no server keeps them."""
    connect: Callable[[str], Any] = connect
    shared: Callable[[], AbstractContextManager[object]] = nullcontext
    """Is held over what several runs share."""
    champion_stays: Callable[[Any, str, str, str], bool] = lambda *_: False
    """Defends a champion: (client, registered model, its champion's version, a newcomer's) → whether it stays."""
    _run: str = field(init=False, default="")
    """The run that was published last; what follows is known of it only."""
    _experiment: str = field(init=False, default="")
    """Id of its experiment."""
    _left_out: str = field(init=False, default="")
    """Why MLflow can take no files of it."""
    _looked: bool = field(init=False, default=False)
    """Whether its rows were looked for, so that MLflow has none beside `_sent`."""
    _sent: dict[str, _Sent] = field(init=False, default_factory=dict)
    _done: dict[str, Row] = field(init=False, default_factory=dict)
    """Row's key → as it was last published, or refused."""

    @cached_property
    def _client(self) -> Any:
        return self.connect(self.uri)

    def publish(self, view: RunView) -> None:
        """Upsert a whole run.

        Raises:
            Exception: MLflow, or the store, cannot be reached; what MLflow has acknowledged is not sent again.
        """
        if view.run != self._run:
            self._run, self._looked, self._sent, self._done = view.run, False, {}, {}
        rows, candidates = self._changed(view.rows), self._changed(view.candidates)
        if not (rows or candidates):
            return
        try:
            if not self._looked:
                self._look(view)
            for row in rows:
                self._upsert(row)
            with self.shared() if candidates else nullcontext():
                for candidate in candidates:
                    self._upsert(candidate)
        except Exception:
            self._looked = False  # a row may have been made, and the answer lost
            raise

    def _changed(self, rows: Sequence[Row]) -> list[Row]:
        return [row for row in rows if self._done.get(row.key) != row]

    def _upsert(self, row: Row) -> None:
        """Upsert a row, or log that MLflow refuses it."""
        for again in (True, False):  # a run of another store may have changed what we share under our hands: look twice
            try:
                if isinstance(row, CandidateRow):
                    self._upsert_candidate(row)
                else:
                    self._upsert_row(row)
                break
            except Exception as error:
                if not is_refusal(error):
                    raise
                if not again:
                    refused = f"{row.name} ({row.key}) of run {self._run}"
                    logger.warning("MLflow does not take %s: %s", refused, redacted(str(error)))
        self._done[row.key] = row

    def _look(self, view: RunView) -> None:
        """Look for a run's experiment and rows; of several for one row, made by writers that raced, one stays."""
        self._experiment = self._experiment_id(view.experiment)
        found: dict[str, Any] = {}
        for run in self._search(f"tags.`{RUN}` = '{legal_name(view.run)}'"):
            if found.setdefault(run.data.tags[KEY], run) is not run:
                self._client.delete_run(run.info.run_id)
        for row in view.rows:
            run, sent = found.get(row.key), self._sent.get(row.key)
            if run is not None and (sent is None or sent.run.info.run_id != run.info.run_id):
                self._sent[row.key] = sent = _Sent(run)
                if row.ended_ms is not None and _has_end(run, row):
                    sent.num_points, sent.files = len(row.points), {*row.texts, *row.files}
        self._looked = True

    def _upsert_row(self, row: Row) -> None:
        sent = self._sent.get(row.key)
        if sent is None:
            parent = self._sent.get(row.parent or "")
            tags = {"mlflow.parentRunId": parent.run.info.run_id} if parent else {}
            sent = self._sent[row.key] = _Sent(self._create(row, row.tags | tags))
        if not self._left_out:
            self._put_files(row, sent)
        elif row.texts or row.files:
            note = "\n\n".join([*filter(None, [row.tags.get("mlflow.note.content")]), self._left_out])
            row = replace(row, tags=row.tags | {"mlflow.note.content": note})
        self._write(row, sent)

    def _put_files(self, row: Row, sent: _Sent) -> None:
        """Write a row's small artifacts: to their URI where that is in reach (0.2 ms, not 4)."""
        artifacts = sent.run.info.artifact_uri
        for path in [path for path in (*row.texts, *row.files) if path not in sent.files]:
            folder, _, name = row.files.get(path, "").rpartition("/")
            try:
                data = Folder.at(folder).get(name) if folder else row.texts[path].encode()
            except FileNotFoundError:
                logger.warning("%s is left out of MLflow, since there is no such file", row.files[path])
                continue
            if urlsplit(artifacts).scheme in REACHABLE:
                Folder.at(artifacts).put(path, data)
            else:
                self._client.log_stream(sent.run.info.run_id, io.BytesIO(data), path)
            sent.files.add(path)

    def _write(self, row: Row, sent: _Sent, model_id: str | None = None) -> None:
        """Send what MLflow lacks of a row: points, params, tags and, last, its end."""
        info, shown = sent.run.info, sent.run.data
        params = {name: value for name, value in row.params.items() if name not in shown.params}
        tags = _changed_tags(row.tags, shown.tags)
        for batch in batches(row.points[sent.num_points :], params, tags, model_id):
            self._client.log_batch(info.run_id, **batch)
            sent.num_points += len(batch["metrics"])
        shown.params.update(params)
        shown.tags.update(tags)
        if row.ended_ms is not None and not _has_end(sent.run, row):
            self._client.set_terminated(info.run_id, row.status, row.ended_ms)

    def _create(self, row: Row, tags: Mapping[str, str]) -> Any:
        tags = {**tags, KEY: row.key}
        return self._client.create_run(self._experiment, start_time=row.started_ms, tags=tags, run_name=row.name[:250])

    def _search(self, where: str) -> list[Any]:
        """Return the MLflow runs of the run's experiment that a filter names, oldest first."""
        found = pages(lambda token: self._client.search_runs([self._experiment], where, page_token=token))
        return sorted(found, key=lambda item: (item.info.start_time, item.info.run_id))

    def _experiment_id(self, name: str) -> str:
        """Return the id of an experiment, made where it is missing."""
        found = self._client.get_experiment_by_name(name)
        if found is None:
            tags = {
                "mlflow.experimentKind": "custom_model_development",
                "mlflow.experiment.primaryMetric.name": PRIMARY_METRIC,
                "mlflow.experiment.primaryMetric.greaterIsBetter": "false",
            }
            folder = re.sub(r"[^A-Za-z0-9._-]+", "-", name)
            location = None if is_server(self.uri) else f"{self.artifact_root}/{folder}"
            with unless_made_already():
                self._client.create_experiment(name, artifact_location=location, tags=tags)
            found = self._client.get_experiment_by_name(name)
        left_out = files_left_out(found.artifact_location) if is_server(self.uri) else ""
        if left_out and left_out != self._left_out:
            logger.warning("%s", left_out)
        self._left_out = left_out
        if found.lifecycle_stage == "deleted":
            self._client.restore_experiment(found.experiment_id)
        if found.tags.get(VIEW) != view_state():
            self._client.set_experiment_tag(found.experiment_id, VIEW, view_state())
        return str(found.experiment_id)

    def _upsert_candidate(self, row: CandidateRow) -> None:
        """Make or complete a candidate's MLflow run, logged model and registration, and tag them with this run."""
        found = _sole(
            lambda: self._search(f"tags.`{KEY}` = '{row.key}'"),
            make=lambda: self._create(row, row.tags),
            delete=lambda extra: self._client.delete_run(extra.info.run_id),
        )
        tags = row.tags
        if int(found.data.tags.get("stillhouse.seen_ms", 0)) > row.started_ms:  # a run that is published late
            tags = {name: value for name, value in tags.items() if name not in ("run", "stillhouse.seen_ms")}
        model = self._model(row, found, tags)
        of_model = {(metric.key, metric.value) for metric in model.metrics or []}
        points = [point for point in row.points if point[:2] not in found.data.metrics.items() & of_model]
        ended_ms = row.ended_ms if found.info.status == "RUNNING" else None
        self._write(replace(row, tags=tags, points=points, ended_ms=ended_ms), _Sent(found), model.model_id)
        if changed := _changed_tags(tags, model.tags):
            self._client.set_logged_model_tags(model.model_id, changed)
        if row.registered_name is not None:
            self._register(row, row.registered_name, found, model.model_id)

    def _model(self, row: CandidateRow, found: Any, tags: Mapping[str, str]) -> Any:
        """Return the logged model of a candidate, made and linked to its MLflow run where it is missing."""
        if found.outputs and (linked := found.outputs.model_outputs):
            return self._client.get_logged_model(linked[0].model_id)
        if models := self._client.search_logged_models([self._experiment], f"tags.`{KEY}` = '{row.key}'"):
            model = min(models, key=lambda item: (item.creation_timestamp, item.model_id))
        else:
            model = self._client.create_logged_model(
                self._experiment,
                name=re.sub(r"[/:.%\"']", "-", row.name),
                source_run_id=found.info.run_id,
                tags={**tags, KEY: row.key, "mlflow.model.isExternal": "true"},
                params=row.params,
                model_type="candidate",
            )
        if str(model.status) != "READY":
            self._client.finalize_logged_model(model.model_id, "READY")
        link(self._client, found.info.run_id, model.model_id)
        return model

    def _register(self, row: CandidateRow, name: str, found: Any, model_id: str) -> None:
        """Make a candidate a version of a registered model and, unless a later verdict stands, its champion."""
        if not self._client.search_registered_models(f"name = '{name}'"):
            with unless_made_already():
                about = f"Its alias `{CHAMPION}` follows the verdicts of stillhouse."
                self._client.create_registered_model(name, description=about)
        registered = self._client.get_registered_model(name)

        def versions() -> list[int]:
            all_versions = self._client.search_model_versions(f"name = '{name}'", max_results=1000)
            return sorted(int(version.version) for version in all_versions if version.tags.get(KEY) == row.key)

        def make() -> None:
            copied = ("artifact", "fingerprint", "scores", "candidate", "made_by_run")
            tags = {KEY: row.key} | {tag: row.tags[tag] for tag in copied if tag in row.tags}
            self._client.create_model_version(
                name, f"models:/{model_id}", found.info.run_id, tags=tags, model_id=model_id
            )

        version = str(_sole(versions, make, lambda extra: self._client.delete_model_version(name, str(extra))))
        if int(registered.tags.get("stillhouse.decided_ms", 0)) >= row.started_ms:
            return
        before = str(registered.aliases.get(CHAMPION, ""))
        if before != version and not (before and self.champion_stays(self._client, name, before, version)):
            if before:
                self._client.set_model_version_tag(name, version, "replaced_version", before)
            self._client.set_registered_model_alias(name, CHAMPION, version)
        self._client.set_registered_model_tag(name, "stillhouse.decided_ms", str(row.started_ms))


def _sole(find: Callable[[], list[Any]], make: Callable[[], object], delete: Callable[[Any], object]) -> Any:
    """Return what is found, made where it is missing; of several, made by writers that raced, the first stays."""
    found = find()
    if not found:
        make()
        found = find()
    for extra in found[1:]:
        delete(extra)
    return found[0]


def _changed_tags(wanted: Mapping[str, str], shown: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in wanted.items() if shown.get(name) != value}


def _has_end(run: Any, row: Row) -> bool:
    return (run.info.status, run.info.end_time) == (row.status, row.ended_ms)
