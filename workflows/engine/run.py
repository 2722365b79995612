"""One run from plan to ledger: opens the store, plans, starts what is needed, drives, tells MLflow what came out."""

import getpass
import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from threading import Event as Flag
from types import ModuleType
from typing import Any

from stages.errors import ConfigError
from stages.storage import Folder
from workflows.engine import events
from workflows.engine.driver import Driver
from workflows.engine.executor import Attempt, AttemptResult, Executor, ProgressUpdates
from workflows.engine.failures import Failure
from workflows.engine.graph import Workflow
from workflows.engine.heartbeat import Heartbeat
from workflows.engine.identity import Fingerprint
from workflows.engine.plan import ClusterResources, Plan, make_plan
from workflows.engine.provenance import git_commit
from workflows.engine.ray_executor import RayExecutor, local_resources
from workflows.engine.results import RunResult, StepResult, Watcher
from workflows.engine.store import ArtifactStore, cost_seconds
from workflows.engine.tracking.publisher import replay
from workflows.engine.tracking.tracker import RunTracker, TrackerState
from workflows.engine.tracking.tracking_uri import default_tracking_uri

LEDGER_SECONDS = 60.0
"""How long the end of a run waits for the ledger; what is not sent by then stays in the journal for the next run."""


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


@dataclass(frozen=True, slots=True)
class Execution:
    """A run and what it left for people."""

    plan: Plan
    result: RunResult
    store: Folder
    reports: Mapping[str, Mapping[str, Any]]
    """Step → the `report.json` that it left."""
    ledger: TrackerState
    tracking_uri: str
    seconds: float


@dataclass(frozen=True, slots=True)
class NoExecutor:
    """Runs nothing: for a run whose every step is a HIT, so that Ray is not started."""

    cluster: ClusterResources

    def cluster_resources(self) -> ClusterResources:
        """Return what there would be to run on."""
        return self.cluster

    def submit(self, attempt: Attempt) -> None:
        """Refuse: the plan had nothing to run."""
        raise AssertionError(f"{attempt.step} was launched in a run that had nothing to run")

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
        return make_plan(
            workflow, store, only=settings.only, strict_code=settings.strict_code, cluster=local_resources()
        )
    tasks = RayExecutor(address=settings.address, verbose=settings.verbose)
    try:
        return make_plan(
            workflow, store, only=settings.only, strict_code=settings.strict_code, cluster=tasks.cluster_resources()
        )
    finally:
        tasks.close()


def execute(
    workflow: Workflow,
    settings: Settings,
    *,
    watch: Callable[[Plan], AbstractContextManager[Watcher]],
    interrupt: Flag,
    params: Mapping[str, str],
    command: str,
    by_value: ModuleType | None = None,
) -> Execution:
    """Run a workflow to its end.

    Args:
        workflow: the graph.
        settings: where and on what.
        watch: makes the watcher once the plan is known.
        interrupt: set by the first Ctrl-C.
        params: the workflow's parameters that differ from their defaults, for the ledger.
        command: the command line that reproduces this run.
        by_value: the user's own workflow module, sent to workers.

    Raises:
        ConfigError: the request is wrong, or a required step could not run; nothing was started.
    """
    began = time.monotonic()
    store = ArtifactStore(settings.store)
    store.check_writable()
    options: dict[str, Any] = {"only": settings.only, "strict_code": settings.strict_code, "deep": True}
    plan = make_plan(workflow, store, **options, cluster=local_resources() if settings.address is None else None)
    tasks: Executor = NoExecutor(local_resources())
    refuse_blocked(plan)
    if plan.having("MISS"):
        tasks = ray = RayExecutor(address=settings.address, verbose=settings.verbose, by_value=by_value)
        if settings.address is not None:
            ray.check_store_is_shared(store.root)
            plan = make_plan(workflow, store, **options, cluster=tasks.cluster_resources())
    try:
        refuse_blocked(plan)
        run = new_run_id()
        tracking, root = settings.tracking(store), store.root.uri_of("mlflow/artifacts")
        replay(store.root / "runs", tracking_uri=tracking, artifact_root=root)
        ledger = RunTracker(tracking_uri=tracking, artifact_root=root, runs=store.root / "runs", run=run)
        try:
            ledger.record(_opened(run, workflow, params, command, store))
            with watch(plan) as watcher, Heartbeat(store.root / "runs", run):
                result = Driver(plan, store, tasks, run, ledger.record, watcher, interrupt).go()
            reports = _tell_results(store, result, ledger)
            ledger.record(_closed(run, result, reports, command))
        finally:
            tasks.close()
            state = ledger.close(LEDGER_SECONDS)
    finally:
        tasks.close()
    return Execution(plan, result, store.root, reports, state, tracking, time.monotonic() - began)


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


def _opened(
    run: str, workflow: Workflow, params: Mapping[str, str], command: str, store: ArtifactStore
) -> events.RunOpened:
    experiment = f"{workflow.name}/{workflow.base_model}" if workflow.base_model else workflow.name
    tags = {"commit": git_commit(), "command": command, "store": store.uri, "user": getpass.getuser()}
    return events.RunOpened(run, workflow.name, experiment, int(time.time() * 1000), params, tags)


def _tell_results(store: ArtifactStore, result: RunResult, ledger: RunTracker) -> dict[str, Mapping[str, Any]]:
    """RunEvent every report's candidates and verdict; return the reports."""
    reports: dict[str, Mapping[str, Any]] = {}
    at_ms = int(time.time() * 1000)
    for name, step in result.steps.items():
        if step.commit is None or step.commit.artifact.kind != "report":
            continue
        report = step.commit.artifact.read_json("report.json")
        reports[name] = with_costs(store, report)
        scores = step.commit.manifest.inputs["scores"].fingerprint
        for candidate in reports[name]["candidates"]:
            tags = {f"note.{key}": text for key, text in candidate.get("notes", {}).items()}
            tags |= {"fingerprint": candidate["fingerprint"], "made_by_run": step.commit.manifest.run}
            found = events.CandidateFound(
                result.run,
                scores,
                candidate["name"],
                at_ms,
                candidate["uri"],
                candidate["params"],
                candidate["metrics"],
                tags,
            )
            ledger.record(found)
        verdict = report["verdict"]
        ledger.record(
            events.VerdictReached(
                result.run, scores, verdict["registered_name"], verdict["champion"], at_ms, tuple(verdict["reasons"])
            )
        )
    return reports


def with_costs(store: ArtifactStore, report: Mapping[str, Any]) -> dict[str, Any]:
    """Return a report whose candidates say what it cost to make them: the seconds of every step before them."""
    candidates = []
    for candidate in report["candidates"]:
        seconds = cost_seconds(store, Fingerprint(candidate["fingerprint"]))
        candidates.append({**candidate, "metrics": {**candidate["metrics"], "final/cost_seconds": round(seconds, 1)}})
    return {**report, "candidates": candidates}


def _closed(run: str, result: RunResult, reports: Mapping[str, Mapping[str, Any]], command: str) -> events.RunClosed:
    status: events.RunStatus = "FINISHED" if result.succeeded else "KILLED" if result.interrupted else "FAILED"
    lines = [f"**{status.lower()}**: {result.executed} of {len(result.steps)} steps run, the others found.", ""]
    files: list[str] = []
    for name, report in reports.items():
        lines += [
            f"Verdict of `{name}`: {report['verdict']['outcome']}",
            *(f"- {reason}" for reason in report["verdict"]["reasons"]),
            "",
        ]
        artifact = _artifact_files(result.steps[name])
        files += artifact
    lines += [
        f"- `{step.name}` {step.outcome}: {step.reason}"
        for step in result.steps.values()
        if step.outcome in ("failed", "skipped", "cancelled")
    ]
    lines += ["", "Reproduce with", "", f"    {command}"]
    return events.RunClosed(run, int(time.time() * 1000), status, "\n".join(lines), tuple(files))


def _artifact_files(step: StepResult) -> list[str]:
    assert step.commit is not None
    return [file.uri for file in step.commit.artifact.files]


def silent(_: Plan) -> AbstractContextManager[Watcher]:
    """Watch a run without a word."""
    return nullcontext(_Silence())


class _Silence:
    def step(self, name: str, phase: Any, text: str) -> None:
        """Say nothing."""

    def progress(self, name: str, done: float, total: float, unit: str) -> None:
        """Say nothing."""

    def note(self, name: str, text: str) -> None:
        """Say nothing."""
