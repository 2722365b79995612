"""The loop of a run: poll → events → decisions → act → record. Holds no resources and does no work itself.

Crash-only: there is no state but the store. Kill it anywhere and call `run` again with the same workflow: committed
steps are HITs, and long steps go on from what they left in `resume`.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Event as Flag

from stages.contract import Artifact
from stages.errors import ExternalDataError
from stages.storage import Folder
from workflows.engine import events
from workflows.engine.events import RunEvent
from workflows.engine.executor import Attempt, AttemptResult, Executor, ProgressUpdates
from workflows.engine.external import ResolvedStep, ResolvedSteps
from workflows.engine.failures import Failure, FailureKind
from workflows.engine.graph import Handle, Source, Wiring
from workflows.engine.heartbeat import Heartbeat, Holder
from workflows.engine.manifest import InputCommit, Manifest, Provenance
from workflows.engine.plan import Plan, StepPlan
from workflows.engine.provenance import code_evidence
from workflows.engine.recorder import Recorder
from workflows.engine.results import STATUS_OF, RunResult, StepResult, StepStatus, Watcher
from workflows.engine.schedule import (
    Began,
    Capacity,
    Committed,
    Decision,
    Event,
    Failed,
    Held,
    Interrupted,
    Launch,
    Phase,
    Schedule,
    Stop,
    Tick,
    Transition,
    advance,
    new_schedule,
)  # fmt: skip
from workflows.engine.store import ArtifactStore, Claim, Commit, Fenced
from workflows.engine.worker import classify

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5
"""How long one turn of the loop waits for a task to end."""
REPORT_SECONDS = 0.5
"""How often stages' reports are fetched."""
IDLE_SECONDS = 0.05
"""How long a turn waits while steps wait for another run or a backoff, and nothing runs."""


@dataclass(slots=True)
class Driver:
    """One run of a plan."""

    plan: Plan
    store: ArtifactStore
    tasks: Executor
    run: str
    record: Callable[[RunEvent], None]
    watcher: Watcher
    interrupt: Flag = field(default_factory=Flag)
    clock: Callable[[], float] = time.monotonic
    _recorder: Recorder = field(init=False)
    _schedule: Schedule = field(init=False)
    _claims: dict[str, Claim] = field(init=False, default_factory=dict)
    _commits: dict[str, Commit] = field(init=False, default_factory=dict)
    _resolved: ResolvedSteps = field(init=False, default_factory=ResolvedSteps)
    _shared: set[str] = field(init=False, default_factory=set)
    _hits: frozenset[str] = field(init=False)
    _next_reports: float = field(init=False, default=0.0)
    _events: deque[Event] = field(init=False, default_factory=deque)

    def __post_init__(self) -> None:
        """Take the plan's hits as committed."""
        self._recorder = Recorder(self.run, self.plan, self.record)
        self._commits = {
            name: step.commit for name, step in self.plan.steps.items() if step.status == "HIT" and step.commit
        }
        self._hits = frozenset(self._commits)
        shape = self.tasks.cluster_resources()
        steps = {name: planned.step for name, planned in self.plan.steps.items()}
        self._schedule = new_schedule(
            steps,
            committed=self._hits,
            capacity=Capacity(shape.cpus, shape.gpus),
            blocked={planned.step.name: planned.reason for planned in self.plan.having("BLOCKED")},
        )

    def go(self) -> RunResult:
        """Run everything that is not committed; return how each step ended."""
        heartbeat = Heartbeat(self.store.root / "runs", self.run)
        try:
            fingerprints = {name: planned.fingerprint for name, planned in self.plan.steps.items()}
            (self.store.root / "runs" / self.run).put_json("steps.json", fingerprints)
            for name in self._hits:
                self._recorder.hit(name, self._commits[name])
            for planned in self.plan.having("MISS"):
                with suppress(Exception):  # told when the step is launched, if it is still so then
                    self._resolved.of(planned)
            self._take(Tick(self.clock()))
            while not self._schedule.over:
                if self.interrupt.is_set() and not self._schedule.interrupted:
                    self._take(Interrupted(self.clock()))
                self._turn()
        finally:
            heartbeat.stop()
        return self._result()

    def _turn(self) -> None:
        running = any(s.phase in (Phase.RUNNING, Phase.STOPPING) for s in self._schedule.steps.values())
        for name, result in self.tasks.poll(POLL_SECONDS if running else IDLE_SECONDS):
            self._ended(name, result)
        if running and self.clock() >= self._next_reports:
            self._next_reports = self.clock() + REPORT_SECONDS
            self._pass_on(self.tasks.reports())
        self._take(Tick(self.clock()))

    def _take(self, event: Event) -> None:
        """Advance the schedule by one event and act on what it decides; events that this brings are taken after it."""
        self._events.append(event)
        if len(self._events) > 1:
            return  # an outer call is at it
        while self._events:
            self._schedule, decisions = advance(self._schedule, self._events[0])
            for decision in decisions:
                self._act(decision)
            self._events.popleft()

    def _act(self, decision: Decision) -> None:
        match decision:
            case Launch():
                self._launch(decision)
            case Stop(step, reason):
                logger.info("deciding to stop %s, since %s", step, reason)
                self.watcher.step(step, Phase.STOPPING, reason)
                self.tasks.cancel(step)
            case Transition(step, phase, reason):
                logger.info("%s: %s", step, reason)
                self.watcher.step(step, phase, reason)
                if phase.over:
                    self._release(step)

    # Starting an attempt --------------------------------------------------------------------------------------------

    def _launch(self, launch: Launch) -> None:
        planned = self.plan.steps[launch.step]
        assert planned.fingerprint is not None
        if self._share(launch):
            return
        claim = self.store.claim(planned.fingerprint, self.run)
        if isinstance(claim, Holder):
            self.watcher.step(
                launch.step, Phase.HELD, f"run {claim.run} on {claim.host} is at it; waiting to share its result"
            )
            self._take(Held(launch.step, self.clock(), claim.run))
            return
        self._claims[launch.step] = claim
        if self._share(launch):  # committed between our look and our claim
            self._release(launch.step)
            return
        self._recorder.opened(launch.step, launch.attempt, "miss")
        try:
            resolved = self._resolved.of(planned)
            inputs = {name: self._resolve(wiring, resolved) for name, wiring in planned.step.inputs.items()}
        except Exception as error:  # noqa: BLE001  data from outside, its own code included: one step's trouble
            self._settle_failed(launch.step, launch.attempt, _of_outside(error))
            return
        if moved := resolved.changed():
            self._settle_failed(launch.step, launch.attempt, Failure(FailureKind.PERMANENT, moved))
            return
        request = Attempt(
            step=launch.step,
            attempt=launch.attempt,
            stage=resolved.stage,
            fingerprint=planned.fingerprint,
            inputs=inputs,
            root=self.store.folder(planned.fingerprint),
            out=self.store.out(claim),
            resume=self.store.resume(claim, self._input_commits(planned)),
            logs=self._logs(),
            resources=launch.resources,
        )
        self.watcher.step(launch.step, Phase.RUNNING, f"attempt {launch.attempt}" if launch.attempt > 1 else "")
        self.tasks.submit(request)

    def _share(self, launch: Launch) -> bool:
        """Take the commit that another run has made since this run was planned, if there is one."""
        planned = self.plan.steps[launch.step]
        assert planned.fingerprint is not None
        newest = self.store.newest(planned.fingerprint)
        if (
            newest is None
            or newest.generation <= planned.seen_generation
            or newest.manifest.inputs != self._input_commits(planned)
        ):
            return False
        self._commits[launch.step] = newest
        self._shared.add(launch.step)
        self._recorder.opened(launch.step, launch.attempt, "hit")
        self._recorder.closed(
            launch.step,
            launch.attempt,
            "FINISHED",
            newest.artifact.metrics,
            {"made_by_run": newest.manifest.run},
        )
        self.watcher.step(launch.step, Phase.COMMITTED, f"shared with run {newest.manifest.run}")
        self._take(Committed(launch.step, self.clock()))
        return True

    def _input_commits(self, planned: StepPlan) -> dict[str, InputCommit]:
        found = {}
        for name, source in planned.step.sources():
            generation = self._commits[source.step].generation if isinstance(source, Handle) else 0
            found[name] = InputCommit(fingerprint=planned.inputs[name], generation=generation)
        return found

    def _resolve(self, wiring: Wiring, resolved: ResolvedStep) -> Artifact | Mapping[str, Artifact]:
        def artifact(source: Source) -> Artifact:
            return self._commits[source.step].artifact if isinstance(source, Handle) else resolved.artifact(source)

        return {key: artifact(s) for key, s in wiring.items()} if isinstance(wiring, Mapping) else artifact(wiring)

    def _logs(self) -> Folder:
        return self.store.root / "runs" / self.run / "logs"

    # Ending one -----------------------------------------------------------------------------------------------------

    def _ended(self, name: str, result: AttemptResult | Failure) -> None:
        state = self._schedule.steps[name]
        self._pass_on(self.tasks.reports())  # the last of its curves, before its record is closed
        ended = self._commit(name, result) if isinstance(result, AttemptResult) else result
        if isinstance(ended, Commit):
            self._commits[name] = ended
            self.store.point(self.plan.workflow.name, name, ended)
            metrics = {
                **ended.artifact.metrics,
                "seconds": ended.seconds,
                "peak_memory_bytes": float(ended.manifest.peak_memory_bytes),
            }
            self._recorder.closed(
                name, state.attempt, "FINISHED", metrics, {"artifact": self.store.out(self._claims[name]).uri}
            )
            self.watcher.step(name, Phase.COMMITTED, f"{ended.seconds:.1f} s")
            self._take(Committed(name, self.clock()))
            return
        status: events.RunStatus = "KILLED" if state.phase is Phase.STOPPING else "FAILED"
        self._settle_failed(name, state.attempt, ended, status)

    def _settle_failed(self, name: str, attempt: int, failure: Failure, status: events.RunStatus = "FAILED") -> None:
        self._recorder.closed(name, attempt, status, {}, {"error": failure.message[:500]})
        self._take(Failed(name, self.clock(), failure))

    def _release(self, name: str) -> None:
        """Let other runs have a step's claim without waiting for this run's end."""
        if name in self._claims:
            try:
                self.store.release(self._claims[name])
            except Exception as error:  # noqa: BLE001  the claim dies with this process anyway
                logger.warning("cannot release the claim on %s: %s", name, error)

    def _commit(self, name: str, done: AttemptResult) -> Commit | Failure:
        planned, claim = self.plan.steps[name], self._claims[name]
        if moved := self._resolved.of(planned).changed():
            return Failure(FailureKind.PERMANENT, moved)
        assert planned.identity is not None
        stage = planned.step.stage
        manifest = Manifest(
            fingerprint=claim.fingerprint,
            generation=claim.generation,
            epoch=claim.epoch,
            kind=stage.KIND,
            stage=type(stage).__name__,
            step=name,
            workflow=self.plan.workflow.name,
            run=self.run,
            files=done.files,
            metrics=dict(done.metrics),
            fallbacks=done.fallbacks,
            identity=dict(planned.identity.record),
            inputs=self._input_commits(planned),
            resources=self._schedule.steps[name].resources,
            provenance=Provenance(**done.environment, **code_evidence(type(stage))),
            seconds=done.seconds,
            peak_memory_bytes=done.peak_memory_bytes,
            created=time.time(),
        )
        try:
            commit = self.store.commit(claim, manifest)
        except Fenced as error:
            return Failure(FailureKind.FENCED, str(error))
        self.store.forget_resume(claim)
        self._release(name)
        return commit

    def _pass_on(self, reports: ProgressUpdates) -> None:
        for name, attempt in sorted(reports.started | reports.curves.keys()):
            state = self._schedule.steps.get(name)  # tasks may have served another run, whose steps have started too
            if state and state.phase is Phase.RUNNING and state.attempt == attempt and state.began_at is None:
                self._take(Began(name, self.clock()))
        for (name, _), (done, total, unit) in reports.progress.items():
            self.watcher.progress(name, done, total, unit)
        for (name, attempt), points in reports.curves.items():
            self._recorder.curves(name, attempt, points)
        for name, _, text in reports.notes:
            self.watcher.note(name, text)

    def _result(self) -> RunResult:
        results = {}
        for name, state in self._schedule.steps.items():
            outcome: StepStatus = (
                "hit" if name in self._hits else "shared" if name in self._shared else STATUS_OF[state.phase]
            )
            log = (
                self._logs().uri_of(f"{name}.{state.attempt}.log")
                if state.attempt and name not in self._shared
                else None
            )
            results[name] = StepResult(name, outcome, state.reason, self._commits.get(name), log, state.attempt)
        return RunResult(self.run, results, self._schedule.succeeded, self._schedule.interrupted)


def _of_outside(error: Exception) -> Failure:
    """Return the failure that an error with data from outside is: what is out of reach may come back."""
    return Failure(FailureKind.TRANSIENT, str(error)) if isinstance(error, ExternalDataError) else classify(error)
