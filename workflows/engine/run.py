"""One run from its plan to MLflow: announces itself, plans, starts what is needed, drives, records what came out."""

import getpass
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from threading import Event as Flag
from types import ModuleType
from typing import Any

from stages.errors import ConfigError
from stages.formats.report import Report
from stages.storage import Folder
from workflows.engine.driver import Driver
from workflows.engine.events import CandidateFound, RunEnded, RunEvent, RunStarted, VerdictReached
from workflows.engine.executor import Attempt, AttemptResult, Executor, ProgressUpdates
from workflows.engine.failures import Failure
from workflows.engine.graph import Workflow
from workflows.engine.heartbeat import Heartbeat
from workflows.engine.identity import Fingerprint
from workflows.engine.plan import ClusterResources, Plan, PlanInterrupted, make_plan
from workflows.engine.provenance import git_commit
from workflows.engine.ray_executor import RayExecutor, local_resources
from workflows.engine.recorder import now_ms
from workflows.engine.results import RunResult, Watcher
from workflows.engine.retrying import persist
from workflows.engine.store import ArtifactStore, cost_seconds
from workflows.engine.tracking.tracker import RunTracker, TrackerState
from workflows.engine.tracking.tracking_uri import (
    TrackingUnavailable,
    check_tracking_uri,
    default_tracking_uri,
    remember_tracking_uri,
)

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
    seconds: float


@dataclass(frozen=True, slots=True)
class NoExecutor:
    """Runs nothing: for a run whose every step is a HIT, so that Ray is not started."""

    cluster: ClusterResources

    def cluster_resources(self) -> ClusterResources:
        """Return what there would be to run on."""
        return self.cluster

    def submit(self, request: Attempt) -> None:
        """Refuse: the plan had nothing to run."""
        raise AssertionError(f"{request.step} was launched in a run that had nothing to run")

    def poll(self, timeout_seconds: float) -> list[tuple[str, AttemptResult | Failure]]:
        """Return nothing at once."""
        return []

    def reports(self) -> ProgressUpdates:
        """Return nothing."""
        return ProgressUpdates()

    def cancel(self, step: str) -> None:
        """Do nothing: nothing runs."""

    def close(self) -> None:
        """Do nothing."""


def plan_only(workflow: Workflow, settings: Settings) -> Plan:
    """Plan a workflow; touch a cluster only where an address is given."""
    store = ArtifactStore(settings.store)
    if settings.address is None:
        return make_plan(workflow, store, **settings.of_plan, cluster=local_resources())
    executor = RayExecutor(address=settings.address, verbose=settings.verbose)
    try:
        return make_plan(workflow, store, **settings.of_plan, cluster=executor.cluster_resources())
    finally:
        executor.close()


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
        workflow: the graph.
        settings: where and on what.
        watch: makes the watcher once the plan is known.
        interrupt: set by the first Ctrl-C.
        params: the workflow's parameters that differ from their defaults, as MLflow shows them.
        command: the command line that reproduces this run.
        by_value: the user's own workflow module, sent to workers.
        progress: is called with a line for people while the plan hashes what the run will read.

    Raises:
        ConfigError: the request is wrong, or a required step could not run; nothing was started.
        PlanInterrupted: `interrupt` was set before anything was started.
    """
    began = time.monotonic()
    store = ArtifactStore(settings.store)
    store.check_writable()
    run, runs, tracking_uri = new_run_id(), store.root / "runs", settings.tracking(store)
    with suppress(TrackingUnavailable):  # the publisher says so, and goes on asking
        check_tracking_uri(tracking_uri)
    with _announced(runs, run), ExitStack() as stack:

        def plan_for(cluster: ClusterResources | None) -> Plan:
            options = {**settings.of_plan, "deep": True, "progress": progress, "interrupt": interrupt}
            plan = make_plan(workflow, store, **options, cluster=cluster)
            refuse_blocked(plan)
            return plan

        plan, executor = _prepare(settings, store, by_value, plan_for, stack)
        remember = partial(remember_tracking_uri, store.root, tracking_uri)
        persist("remember the tracking URI", remember, interrupt)
        root = store.root.uri_of("mlflow/artifacts")
        tracker = RunTracker(tracking_uri=tracking_uri, artifact_root=root, runs=runs, run=run)
        try:
            tracker.record(run_started(run, workflow, params, command, store))
            with watch(plan) as watcher:
                result = Driver(plan, store, executor, run, tracker.record, watcher, interrupt).go()
            reports = persist("read the run's reports", partial(_reports, store, result), interrupt)
            for event in _outcomes(result, reports, command):
                tracker.record(event)
        except Exception as error:
            tracker.record(_broken_off(error, command))
            raise
        finally:
            executor.close()
            state = tracker.close(TRACKING_SECONDS)
    return Execution(plan, result, store.root, reports, state, tracking_uri, time.monotonic() - began)


def refuse_blocked(plan: Plan) -> None:
    """Raise one error that names every required step that could not run.

    Raises:
        ConfigError: there is one.
    """
    blocked = [step for step in plan.having("BLOCKED") if step.step.required]
    if blocked:
        raise ConfigError(
            "nothing was started:\n" + "\n".join(f"  - {step.step.name} is blocked: {step.reason}" for step in blocked)
        )


def new_run_id() -> str:
    """Return a run id that sorts by time."""
    return time.strftime("%Y%m%d-%H%M%S", time.gmtime()) + "-" + secrets.token_hex(3)


@contextmanager
def _announced(runs: Folder, run: str) -> Iterator[None]:
    """Show from before its plan on that a run lives, so that `gc` keeps what it reads; a refused one leaves nothing."""
    try:
        with Heartbeat(runs, run):
            yield
    except (ConfigError, PlanInterrupted):
        (runs / run).delete(["heartbeat.json"])
        (runs / run).prune()
        raise


def _prepare(
    settings: Settings,
    store: ArtifactStore,
    by_value: ModuleType | None,
    plan_for: Callable[[ClusterResources | None], Plan],
    stack: ExitStack,
) -> tuple[Plan, Executor]:
    """Plan and start what the plan runs on, which the stack closes; nothing where every step is a HIT."""
    local = local_resources()
    plan = plan_for(local if settings.address is None else None)
    if not plan.having("MISS"):
        return plan, NoExecutor(local)
    executor = RayExecutor(address=settings.address, verbose=settings.verbose, by_value=by_value)
    stack.callback(executor.close)
    if settings.address is not None:
        executor.check_store_is_shared(store.root)
        plan = plan_for(executor.cluster_resources())
    return plan, executor


def run_started(
    run: str, workflow: Workflow, params: Mapping[str, str], command: str, store: ArtifactStore
) -> RunStarted:
    """Return the event of a run that begins now."""
    return RunStarted(
        run=run,
        workflow=workflow.name,
        experiment=f"{workflow.name}/{workflow.base_model}" if workflow.base_model else workflow.name,
        at_ms=now_ms(),
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
    commits = {name: step.commit for name, step in result.steps.items() if step.commit is not None}
    artifacts = {name: commit.artifact for name, commit in commits.items() if commit.artifact.kind == "report"}
    return {name: _with_costs(store, Report.read(artifact)) for name, artifact in artifacts.items()}


def _with_costs(store: ArtifactStore, report: Report) -> Report:
    """Return a report whose candidates say what it cost to make them: the seconds of every step before them."""
    found = {candidate.name: Fingerprint(candidate.fingerprint) for candidate in report.candidates}
    costs = {name: round(cost_seconds(store, fingerprint), 1) for name, fingerprint in found.items()}
    return report.with_metric("final/cost_seconds", costs)


def _outcomes(result: RunResult, reports: Mapping[str, Report], command: str) -> Iterator[RunEvent]:
    """Yield what a run came to: every report's candidates and verdict, and the end."""
    for name, report in reports.items():
        commit = result.steps[name].commit
        assert commit is not None
        scores = commit.manifest.inputs["scores"].fingerprint
        for candidate in report.candidates:
            notes = {f"note.{key}": text for key, text in candidate.notes.items()}
            yield CandidateFound(
                scores=scores,
                name=candidate.name,
                at_ms=now_ms(),
                artifact=candidate.uri,
                params=candidate.params,
                metrics=candidate.metrics,
                tags={**notes, "fingerprint": candidate.fingerprint, "made_by_run": commit.manifest.run},
            )
        yield VerdictReached(
            scores=scores,
            registered_name=report.verdict.registered_name,
            champion=report.verdict.champion,
            at_ms=now_ms(),
            reasons=report.verdict.reasons,
            outcome=report.verdict.outcome,
            warnings=report.verdict.warnings,
        )
    commits = [result.steps[name].commit for name in reports]
    yield RunEnded(
        at_ms=now_ms(),
        status="FINISHED" if result.succeeded else "KILLED" if result.interrupted else "FAILED",
        note=_note(result, reports, command),
        files=tuple(file.uri for commit in commits if commit is not None for file in commit.artifact.files),
    )


def _broken_off(error: Exception, command: str) -> RunEnded:
    """Return the end of a run that an error of its own, not of a step, ended."""
    note = f"**failed**: {type(error).__name__}: {error}\n\nGo on with\n\n    {command}"
    return RunEnded(at_ms=now_ms(), status="FAILED", note=note)


def _note(result: RunResult, reports: Mapping[str, Report], command: str) -> str:
    """Return in Markdown what came out and how to reproduce it."""
    state = "finished" if result.succeeded else "killed" if result.interrupted else "failed"
    lines = [f"**{state}**: {result.executed} of {len(result.steps)} steps run, the others found.", ""]
    for name, report in reports.items():
        lines += [f"Verdict of `{name}`: {report.verdict.outcome}"]
        lines += [f"- {reason}" for reason in report.verdict.reasons]
        lines += [f"- {claim.text}" for claim in report.verdict.claims]
        lines += [*(f"- **Warning**: {warning}" for warning in report.verdict.warnings), ""]
    unfinished = [step for step in result.steps.values() if step.outcome in ("failed", "skipped", "cancelled")]
    lines += [f"- `{step.name}` {step.outcome}: {step.reason}" for step in unfinished]
    return "\n".join([*lines, "", "Reproduce with", "", f"    {command}"])
