"""Upserts the view of a run into MLflow: rows, candidates, the registry; it is handed the connection.

Promises: `publish` may be called again after it failed anywhere, and leaves the same as one call that went through:
each MLflow run bears a key by which it is looked for before it is made, and only what MLflow has not acknowledged is
sent. What has not changed is skipped by digest: in this process by memory, after a restart by a tag of the MLflow run.
What MLflow will never take is logged and does not hold up the rest.
Does not: retry, or decide what is shown.

MLflow is addressed by explicit run ids only: a "current run" would leak between tasks of one process.
"""

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

from stages.formats.metrics import PRIMARY_METRIC
from stages.storage import Folder
from workflows.engine.redaction import redacted
from workflows.engine.tracking.connection import MAX_METRICS, Connection, is_refusal, pages, unless_made_already
from workflows.engine.tracking.tracking_uri import check_tracking_uri
from workflows.engine.tracking.ui_view import VIEW, view_state
from workflows.engine.tracking.view import KEY, RUN, CandidateEntry, MetricPoint, Registration, Row, RunView, legal_name

__all__ = ["MlflowStore"]

logger = logging.getLogger(__name__)

CHAMPION = "champion"
DIGEST = "stillhouse.digest"
"""Tag of an ended row: the digest of what is published; the row's status, which is sent last, makes it valid."""

P = TypeVar("P", Row, CandidateEntry, Registration)


@dataclass(slots=True)
class _Sent:
    """What MLflow has of a row for certain; what it may have beside that is sent again, which changes nothing."""

    run_id: str
    artifacts: str
    params: dict[str, str]
    tags: dict[str, str]
    num_points: int = 0
    files: set[str] = field(default_factory=set)


class MlflowStore:
    """MLflow, as runs are published to it."""

    def __init__(
        self,
        connect: Callable[[], Connection],
        shared: Callable[[], AbstractContextManager[object]] = nullcontext,
        champion_stays: Callable[[Any, str, str, str], bool] = lambda *_: False,
    ) -> None:
        """Connect by `connect` once there is something to publish; hold `shared` over what several runs share.

        `champion_stays` (client, registered model, its champion's version, a newcomer's) defends the champion.
        """
        self._connect, self._shared, self._champion_stays = connect, shared, champion_stays
        self._experiments: dict[str, str] = {}
        self._found: set[str] = set()
        """Runs whose rows were looked for, and of which MLflow has none beside `_sent`."""
        self._sent: dict[str, _Sent] = {}
        """Row's key → what MLflow has of it."""
        self._done: dict[tuple[str, str], str] = {}
        """(run, part's key) → the digest with which MLflow has it, or refused it; of an ended row also a tag there."""

    @cached_property
    def _mlflow(self) -> Connection:
        return self._connect()

    @property
    def _client(self) -> Any:
        return self._mlflow.client

    def check_reachable(self) -> None:
        """Raise `TrackingUnavailable` where nothing listens."""
        check_tracking_uri(self._mlflow.uri)

    def publish(self, view: RunView) -> None:
        """Upsert a whole run.

        Raises:
            Exception: MLflow, or the store, cannot be reached; what MLflow has acknowledged is not sent again.
        """
        candidates, registrations = self._changed(view, view.candidates), self._changed(view, view.registrations)
        if not (candidates or registrations or self._changed(view, view.rows)):
            return
        self._client  # noqa: B018  connects: what keeps it from that is no refusal of a part
        try:
            if view.run not in self._found:
                self._find_rows(view)
            for row in self._changed(view, view.rows):
                self._upsert(view, row, self._upsert_row)
            with self._shared() if candidates or registrations else nullcontext():
                for candidate in candidates:
                    self._upsert(view, candidate, self._upsert_candidate)
                for registration in registrations:
                    self._upsert(view, registration, self._register)
        except Exception:
            self._found.discard(view.run)  # a row may have been made, and the answer lost
            raise

    def _changed(self, view: RunView, parts: Iterable[P]) -> list[P]:
        return [part for part in parts if self._done.get((view.run, part.key)) != part.digest]

    def _upsert(self, view: RunView, part: P, upsert: Callable[[RunView, P], None]) -> None:
        """Upsert a part, or log that MLflow refuses it."""
        for again in (True, False):  # a run of another store may have changed what we share under our hands: look twice
            try:
                upsert(view, part)
                break
            except Exception as error:
                if not is_refusal(error):
                    raise
                if not again:
                    what = f"the {type(part).__name__.lower()} {part.key} of run {view.run}"
                    logger.warning("MLflow does not take %s: %s", what, redacted(str(error)))
        self._done[view.run, part.key] = part.digest

    # Runs and steps -------------------------------------------------------------------------------------------------

    def _upsert_row(self, view: RunView, row: Row) -> None:
        ended = row.status != "RUNNING"
        wanted = row.tags | ({DIGEST: row.digest} if ended else {})
        sent = self._sent.get(row.key)
        if sent is None:
            parent = {"mlflow.parentRunId": self._sent[row.parent].run_id} if row.parent in self._sent else {}
            sent = _sent_of(self._create(view, row.key, row.name, wanted | parent, row.started_ms))
            self._sent[row.key] = sent
        for name, data in _contents(row, sent.files):
            self._mlflow.put(sent.run_id, sent.artifacts, name, data)
            sent.files.add(name)
        while len(row.points) - sent.num_points > MAX_METRICS:
            self._mlflow.log(sent.run_id, points=row.points[sent.num_points :][:MAX_METRICS])
            sent.num_points += MAX_METRICS
        params = {name: value for name, value in row.params.items() if name not in sent.params}
        tags = {name: value for name, value in wanted.items() if sent.tags.get(name) != value}
        self._mlflow.log(sent.run_id, points=row.points[sent.num_points :], params=params, tags=tags)
        sent.params |= params
        sent.tags |= tags
        sent.num_points = len(row.points)
        if ended:  # the last thing: a row that has its digest and its status has all
            self._client.set_terminated(sent.run_id, row.status, row.ended_ms)

    def _find_rows(self, view: RunView) -> None:
        """Look for a run's rows in MLflow; of several for one, made by writers that raced, one stays."""
        rows: dict[str, Any] = {}
        for found in self._search(view, f"tags.`{RUN}` = '{legal_name(view.run)}'"):
            if rows.setdefault(found.data.tags[KEY], found) is not found:
                self._client.delete_run(found.info.run_id)
        for row in view.rows:
            found, sent = rows.get(legal_name(row.key)), self._sent.get(row.key)
            if found is None or (sent is not None and sent.run_id == found.info.run_id):
                continue
            self._sent[row.key] = _sent_of(found)
            if found.info.status == row.status and DIGEST in found.data.tags:
                self._done[view.run, row.key] = found.data.tags[DIGEST]
        self._found.add(view.run)

    def _search(self, view: RunView, where: str) -> list[Any]:
        """Return the MLflow runs of the run's experiment that a filter names, oldest first."""
        among = [self._experiment(view)]
        found = pages(lambda token: self._client.search_runs(among, where, page_token=token))
        return sorted(found, key=lambda item: (item.info.start_time, item.info.run_id))

    def _create(self, view: RunView, key: str, name: str, tags: Mapping[str, str], at_ms: int) -> Any:
        tags = {**tags, KEY: legal_name(key)}
        return self._client.create_run(self._experiment(view), start_time=at_ms, tags=tags, run_name=name[:250])

    def _experiment(self, view: RunView) -> str:
        """Return the id of a run's experiment, made where it is missing."""
        name = view.experiment
        if name not in self._experiments:
            found = self._client.get_experiment_by_name(name) or self._make_experiment(name)
            if found.lifecycle_stage == "deleted":
                self._client.restore_experiment(found.experiment_id)
            if found.tags.get(VIEW) != view_state():
                self._client.set_experiment_tag(found.experiment_id, VIEW, view_state())
            self._experiments[name] = str(found.experiment_id)
        return self._experiments[name]

    def _make_experiment(self, name: str) -> Any:
        tags = {
            "mlflow.experimentKind": "custom_model_development",
            "mlflow.experiment.primaryMetric.name": PRIMARY_METRIC,
            "mlflow.experiment.primaryMetric.greaterIsBetter": "false",
            VIEW: view_state(),
        }
        root = self._mlflow.artifact_location
        location = root and f"{root}/{re.sub(r'[^A-Za-z0-9._-]+', '-', name)}"
        with unless_made_already():
            self._client.create_experiment(name, artifact_location=location, tags=tags)
        return self._client.get_experiment_by_name(name)

    # Candidates -----------------------------------------------------------------------------------------------------

    def _find(self, view: RunView, key: str) -> Any:
        """Return the MLflow run of a candidate, if any. Of several, made by writers that raced, one stays."""
        found = self._search(view, f"tags.`{KEY}` = '{key}'")
        for extra in found[1:]:
            self._client.delete_run(extra.info.run_id)
        return found[0] if found else None

    def _upsert_candidate(self, view: RunView, candidate: CandidateEntry) -> None:
        """Make or complete a candidate's MLflow run and logged model, and tag them with this run."""
        tags = candidate.tags
        found = self._find(view, candidate.key)
        if found is None:
            self._create(view, candidate.key, candidate.name, tags, candidate.at_ms)
            found = self._find(view, candidate.key)  # another run may have made it at the same moment
        shown = found.data
        if int(shown.tags.get("stillhouse.seen_ms", 0)) > candidate.at_ms:  # a run that is published late
            tags = {name: value for name, value in tags.items() if name not in ("run", "stillhouse.seen_ms")}
        model = self._model(view, candidate, found, tags)
        of_model = {metric.key: metric.value for metric in model.metrics or []}
        points: list[MetricPoint] = [
            (name, value, 0, candidate.at_ms)
            for name, value in candidate.metrics.items()
            if shown.metrics.get(name) != value or of_model.get(name) != value
        ]
        self._mlflow.log(
            found.info.run_id,
            points=points,
            params={name: value for name, value in candidate.params.items() if name not in shown.params},
            tags={name: value for name, value in tags.items() if shown.tags.get(name) != value},
            model_id=model.model_id,
        )
        if missing := {name: value for name, value in tags.items() if model.tags.get(name) != value}:
            self._client.set_logged_model_tags(model.model_id, missing)
        if found.info.status == "RUNNING":
            self._client.set_terminated(found.info.run_id, "FINISHED", candidate.at_ms)

    def _model(self, view: RunView, candidate: CandidateEntry, found: Any, tags: Mapping[str, str]) -> Any:
        """Return the logged model of a candidate, made and linked to its MLflow run where it is missing."""
        if linked := _model_ids(found):
            return self._client.get_logged_model(linked[0])
        experiment = self._experiment(view)
        if models := self._client.search_logged_models([experiment], f"tags.`{KEY}` = '{candidate.key}'"):
            model = min(models, key=lambda item: (item.creation_timestamp, item.model_id))
        else:
            model = self._client.create_logged_model(
                experiment,
                name=re.sub(r"[/:.%\"']", "-", candidate.name),
                source_run_id=found.info.run_id,
                tags={**tags, KEY: candidate.key, "mlflow.model.isExternal": "true"},
                params=candidate.params,
                model_type="candidate",
            )
        if str(model.status) != "READY":
            self._client.finalize_logged_model(model.model_id, "READY")
        self._mlflow.link(found.info.run_id, model.model_id)
        return model

    # The registry ---------------------------------------------------------------------------------------------------

    def _register(self, view: RunView, registration: Registration) -> None:
        """Make a candidate a version of its registered model and, unless a later verdict stands, its champion."""
        found = self._find(view, registration.candidate)
        if found is None or not _model_ids(found):
            champion = registration.name
            raise ValueError(f"the verdict of run {view.run} names the candidate {champion!r}, which was never found")
        name = registration.registered_name
        registered = self._registered_model(name)
        version = self._version(name, registration.candidate, found)
        if int(registered.tags.get("stillhouse.decided_ms", 0)) >= registration.at_ms:
            return
        before = str(registered.aliases.get(CHAMPION, ""))
        if before != version and not (before and self._champion_stays(self._client, name, before, version)):
            if before:
                self._client.set_model_version_tag(name, version, "replaced_version", before)
            self._client.set_registered_model_alias(name, CHAMPION, version)
        self._client.set_registered_model_tag(name, "stillhouse.decided_ms", str(registration.at_ms))

    def _registered_model(self, name: str) -> Any:
        if not self._client.search_registered_models(f"name = '{name}'"):
            with unless_made_already():
                about = f"Its alias `{CHAMPION}` follows the verdicts of stillhouse."
                self._client.create_registered_model(name, description=about)
        return self._client.get_registered_model(name)

    def _version(self, name: str, key: str, found: Any) -> str:
        """Return the one version of a candidate, made where it is missing; of several, by racing writers, one stays."""

        def versions() -> list[int]:
            all_versions = self._client.search_model_versions(f"name = '{name}'", max_results=1000)
            return sorted(int(version.version) for version in all_versions if version.tags.get(KEY) == key)

        if not (standing := versions()):
            self._mlflow.set_globals()  # the sqlite registry looks for the logged model in the global store
            (model_id, *_), shown = _model_ids(found), found.data.tags
            copied = ("artifact", "fingerprint", "scores", "candidate", "made_by_run")
            tags = {KEY: key} | {tag: shown[tag] for tag in copied if tag in shown}
            self._client.create_model_version(
                name, f"models:/{model_id}", found.info.run_id, tags=tags, model_id=model_id
            )
            standing = versions()
        for extra in standing[1:]:
            self._client.delete_model_version(name, str(extra))
        return str(standing[0])


def _sent_of(found: Any) -> _Sent:
    return _Sent(found.info.run_id, found.info.artifact_uri, dict(found.data.params), dict(found.data.tags))


def _model_ids(found: Any) -> list[str]:
    """Return the ids of the logged models that are linked to an MLflow run."""
    return [output.model_id for output in (found.outputs.model_outputs if found.outputs else [])]


def _contents(row: Row, known: set[str]) -> Iterator[tuple[str, bytes]]:
    """Yield the small artifacts of a row that are not known, by path."""
    yield from ((path, text.encode()) for path, text in row.texts.items() if path not in known)
    for path, uri in row.files.items():
        folder, _, name = uri.rpartition("/")
        try:
            if path not in known:
                yield path, Folder.at(folder).get(name)
        except FileNotFoundError:
            logger.warning("%s is left out of MLflow, since there is no such file", uri)
