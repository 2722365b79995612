"""One run from its plan to MLflow: announces itself, plans, starts what is needed, drives, records what came out."""

import getpass
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from threading import Event as Flag
from types import ModuleType
from typing import Any

from stages.errors import ConfigError
from stages.formats.report import Report
from stages.storage import Folder
from workflows.engine.driver import Driver
from workflows.engine.events import ReportMade, RunEnded, RunEvent, RunStarted, RunStatus
from workflows.engine.graph import Workflow
from workflows.engine.heartbeat import beating
from workflows.engine.identity import Fingerprint
from workflows.engine.plan import ClusterResources, Plan, PlanInterrupted, make_plan, watch_hashing
from workflows.engine.provenance import git_commit
from workflows.engine.ray_executor import RayExecutor
from workflows.engine.results import RunResult, Watcher
from workflows.engine.retrying import persist
from workflows.engine.store import ArtifactStore, cost_seconds
from workflows.engine.tracking.publisher import WORK_GOES_ON
from workflows.engine.tracking.tracker import RunTracker, TrackerState
from workflows.engine.tracking.tracking_uri import (
    TrackingUnavailable,
    check_tracking_uri,
    default_tracking_uri,
    remember_tracking_uri,
)

logger = logging.getLogger(__name__)

TRACKING_SECONDS = 60.0
"""How long the end of a run waits for MLflow; what it does not have by then waits for a later run's publisher."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Where a run reads and writes, and what it runs on."""

    store: str = "./.stillhouse"
    tracking_uri: str | None = None
    address: str | None = None
    only: str | None = None
    strict_code: bool = False
    verbose: bool = False

    def tracking(self, store: ArtifactStore) -> str:
        """Return the tracking URI: the one given, else a sqlite file inside the store."""
        return self.tracking_uri or default_tracking_uri(store.uri)

    @property
    def of_plan(self) -> dict[str, Any]:
        """Return the arguments of `make_plan` among them."""
        return {"only": self.only, "strict_code": self.strict_code}


@dataclass(frozen=True, slots=True)
class Execution:
    """A run and what it left for people."""

    plan: Plan
    result: RunResult
    store: Folder
    reports: Mapping[str, Report]
    """Step → the report that it left."""
    tracking: TrackerState
    tracking_uri: str
    not_sent: str
    """Why MLflow got no files, or ""."""
    seconds: float


def plan_only(workflow: Workflow, settings: Settings) -> Plan:
    """Plan a workflow; touch a cluster only where an address is given."""
    with closing(RayExecutor(address=settings.address, verbose=settings.verbose)) as executor:
        if settings.address is not None:
            executor.start()
        cluster = executor.cluster_resources()
        return make_plan(workflow, ArtifactStore(settings.store), **settings.of_plan, cluster=cluster)


def execute(
    workflow: Workflow,
    settings: Settings,
    *,
    watch: Callable[[Plan], AbstractContextManager[Watcher]],
    interrupt: Flag,
    params: Mapping[str, str],
    command: str,
    by_value: ModuleType | None = None,
    progress: Callable[[str], None] | None = None,
) -> Execution:
    """Run a workflow to its end.

    Args:
        watch: makes the watcher once the plan is known.
        interrupt: set by the first Ctrl-C.
        params: the workflow's parameters that differ from their defaults, as MLflow shows them.
        progress: is called with a line for people while the plan hashes what the run will read.

    Raises:
        ConfigError: the request is wrong, or a required step could not run; nothing was started.
        PlanInterrupted: `interrupt` was set before anything was started.
    """
    began = time.monotonic()
    store = ArtifactStore(settings.store)
    store.check_writable()
    run = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(3)}"  # sorts by time
    runs, tracking_uri = store.root / "runs", settings.tracking(store)
    warned, not_sent = _warn_of_mlflow(tracking_uri, workflow.experiment)
    executor = RayExecutor(address=settings.address, verbose=settings.verbose, by_value=by_value)
    with _announced(runs, run), closing(executor):

        def plan_for(cluster: ClusterResources | None) -> Plan:
            watch = watch_hashing(progress, interrupt)
            return _unblocked(make_plan(workflow, store, **settings.of_plan, cluster=cluster, watch=watch))

        plan = plan_for(executor.cluster_resources() if settings.address is None else None)
        if plan.having("MISS"):
            executor.start()
            if settings.address is not None:
                executor.check_store_is_shared(store.root)
                plan = plan_for(executor.cluster_resources())
        persist("remember the tracking URI", partial(remember_tracking_uri, store.root, tracking_uri), interrupt)
        tracker = RunTracker(tracking_uri=tracking_uri, runs=runs, run=run, warned=warned)
        try:
            tracker.record(run_started(run, workflow, params, command, store))
            with watch(plan) as watcher:
                result = Driver(plan, store, executor, run, tracker.record, watcher, interrupt).go()
            reports = persist("read the run's reports", partial(_reports, store, result), interrupt)
            for event in _outcomes(result, reports, command):
                tracker.record(event)
        except Exception as error:
            note = f"**failed**: {type(error).__name__}: {error}\n\nGo on with\n\n    {command}"
            tracker.record(RunEnded(status="FAILED", note=note))
            raise
        finally:
            executor.close()
            state = tracker.close(TRACKING_SECONDS)
    return Execution(plan, result, store.root, reports, state, tracking_uri, not_sent, time.monotonic() - began)


def _warn_of_mlflow(uri: str, experiment: str) -> tuple[str, str]:
    """Warn of what MLflow will not get; return the warning, and of it why files are left out for good."""
    try:
        warning = not_sent = check_tracking_uri(uri, experiment)
    except TrackingUnavailable as error:
        warning, not_sent = WORK_GOES_ON % error, ""
    if warning:
        logger.warning("%s", warning)
    return warning, not_sent


def _unblocked(plan: Plan) -> Plan:
    """Return a plan, or raise one `ConfigError` that names every required step that could not run."""
    blocked = [step for step in plan.having("BLOCKED") if step.step.required]
    if blocked:
        reasons = [f"  - {step.step.name} is blocked: {step.reason}" for step in blocked]
        raise ConfigError("\n".join(["nothing was started:", *reasons]))
    return plan


@contextmanager
def _announced(runs: Folder, run: str) -> Iterator[None]:
    """Show from before its plan on that a run lives, so that `gc` keeps what it reads; a refused one leaves nothing."""
    try:
        with beating(runs, run):
            yield
    except (ConfigError, PlanInterrupted):
        (runs / run).delete(["heartbeat.json"])
        (runs / run).prune()
        raise


def run_started(
    run: str, workflow: Workflow, params: Mapping[str, str], command: str, store: ArtifactStore
) -> RunStarted:
    """Return the event of a run that begins now."""
    return RunStarted(
        run=run,
        workflow=workflow.name,
        experiment=workflow.experiment,
        params=params,
        command=command,
        commit=git_commit(),
        user=_user(),
        store=store.uri,
    )


def _user() -> str:
    """Return the user's name, or the number where a container gives it no name."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def _reports(store: ArtifactStore, result: RunResult) -> dict[str, Report]:
    """Return step → its report, whose candidates say what they cost: the seconds of every step before them."""
    reports = {}
    for name, step in result.steps.items():
        if step.commit is not None and step.commit.artifact.kind == "report":
            report = Report.read(step.commit.artifact)
            found = [(candidate.name, Fingerprint(candidate.fingerprint)) for candidate in report.candidates]
            costs = {candidate: round(cost_seconds(store, fingerprint), 1) for candidate, fingerprint in found}
            reports[name] = report.with_metric("final/cost_seconds", costs)
    return reports


def _outcomes(result: RunResult, reports: Mapping[str, Report], command: str) -> Iterator[RunEvent]:
    """Yield what a run came to: its reports, and the end."""
    files: list[str] = []
    for name, report in reports.items():
        commit = result.steps[name].commit
        assert commit is not None
        scores = commit.manifest.inputs["scores"].fingerprint
        yield ReportMade(scores=scores, made_by_run=commit.manifest.run, report=report)
        files += [file.uri for file in commit.artifact.files]
    status: RunStatus = "FINISHED" if result.succeeded else "KILLED" if result.interrupted else "FAILED"
    lines = [f"**{status.lower()}**: {result.executed} of {len(result.steps)} steps run, the others found.", ""]
    for name, report in reports.items():
        lines += [f"Verdict of `{name}`: {report.verdict.outcome}"]
        lines += [f"- {reason}" for reason in report.verdict.reasons]
        lines += [f"- {claim.text}" for claim in report.verdict.claims]
        lines += [*(f"- **Warning**: {warning}" for warning in report.verdict.warnings), ""]
    unfinished = [step for step in result.steps.values() if step.outcome in ("failed", "skipped", "cancelled")]
    lines += [f"- `{step.name}` {step.outcome}: {step.reason}" for step in unfinished]
    note = "\n".join([*lines, "", "Reproduce with", "", f"    {command}"])
    yield RunEnded(status=status, note=note, files=tuple(files))
