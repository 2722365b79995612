"""The loop of a run: poll → events → states → act → record. Holds no resources and does no work itself.

Crash-only: there is no state but the store. Kill it anywhere and call `run` again with the same workflow: committed
steps are HITs, and long steps go on from what they left in `resume`.

Promises: a store that fails is asked again, a launch without holding up the loop; what stays broken fails one attempt,
never the run. What follows a commit is best effort. A step that another run took over is stopped within
`LEASE_SECONDS`. A watcher that raises is ignored. The code that a manifest names is the code as the run began.
"""

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from threading import Event as Flag

from stages.contract import Artifact
from stages.errors import ExternalDataError, StageFailed, StillhouseError
from stages.storage import STORE_ERRORS, Folder
from workflows.engine import schedule
from workflows.engine.events import RunEvent, RunStatus
from workflows.engine.executor import Attempt, AttemptResult, Executor, ProgressUpdates
from workflows.engine.external import ResolvedSteps
from workflows.engine.failures import Failure, FailureKind
from workflows.engine.graph import Handle, Source
from workflows.engine.heartbeat import Holder
from workflows.engine.manifest import InputCommit, Manifest, Provenance
from workflows.engine.plan import Plan, StepPlan, input_commits
from workflows.engine.provenance import code_evidence
from workflows.engine.recorder import Recorder
from workflows.engine.results import RunResult, StepResult, Watcher
from workflows.engine.retrying import PAUSES_SECONDS, attempt_once, brief, persist
from workflows.engine.schedule import Event, Phase, Schedule, StepState
from workflows.engine.store import ArtifactStore, Claim, Commit
from workflows.engine.worker import classify

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5
"""How long one turn of the loop waits for a task to end; stages' reports are fetched at its end."""
IDLE_SECONDS = 0.05
"""How long a turn waits while steps wait for another run or a backoff, and nothing runs."""
HELD_POLL_SECONDS = 1.0
"""How often a step that another run holds is looked at again."""
LEASE_SECONDS = 5.0
"""How often a run looks whether another one took a running step over: one listing for each such step."""


@dataclass(slots=True)
class Driver:
    """One run of a plan, in a process whose heartbeat beats (`heartbeat.beating`)."""

    plan: Plan
    store: ArtifactStore
    executor: Executor
    run: str
    record: Callable[[RunEvent], None]
    watcher: Watcher
    interrupt: Flag = field(default_factory=Flag)
    clock: Callable[[], float] = time.monotonic
    _folder: Folder = field(init=False)
    _recorder: Recorder = field(init=False)
    _schedule: Schedule = field(init=False)
    _claims: dict[str, Claim] = field(init=False, default_factory=dict)
    _commits: dict[str, Commit] = field(init=False, default_factory=dict)
    _resolved: ResolvedSteps = field(init=False, default_factory=ResolvedSteps)
    _shared: set[str] = field(init=False, default_factory=set)
    _outages: Counter[str] = field(init=False, default_factory=Counter)  # launches in a row that the store failed
    _code: dict[str, dict[str, str]] = field(init=False)  # as the run begins: files may be edited meanwhile
    _next_lease_check: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        plan, cluster = self.plan, self.executor.cluster_resources()
        self._folder = self.store.root / "runs" / self.run
        self._recorder = Recorder(plan, self.record)
        self._commits = {step.step.name: step.commit for step in plan.having("HIT") if step.commit}
        self._code = {planned.step.name: code_evidence(type(planned.step.stage)) for planned in plan.having("MISS")}
        self._schedule = schedule.new_schedule(
            {name: planned.step for name, planned in plan.steps.items()},
            committed=frozenset(self._commits),
            cpus=cluster.cpus,
            gpus=cluster.gpus,
            blocked={planned.step.name: planned.reason for planned in plan.having("BLOCKED")},
        )

    def go(self) -> RunResult:
        """Run everything that is not committed; return how each step ended."""
        fingerprints = {name: planned.fingerprint for name, planned in self.plan.steps.items()}
        persist("note the run's steps", lambda: self._folder.put_json("steps.json", fingerprints), self.interrupt)
        for name, commit in self._commits.items():
            self._recorder.hit(name, commit)
        for planned in self.plan.having("MISS"):
            with suppress(Exception):  # reported when the step is launched, if it is still so then
                self._resolved.of(planned)
        while not self._schedule.over:
            self._take(schedule.Tick(self.clock()))
            if self.interrupt.is_set() and not self._schedule.interrupted:
                self._take(schedule.Interrupted(self.clock()))
            running = any(self._schedule.in_phase(Phase.RUNNING, Phase.STOPPING))
            ended = self.executor.poll(POLL_SECONDS if running else IDLE_SECONDS)
            if running:
                self._take(*self._pass_on(self.executor.reports()))  # the last curves, before their record is closed
            for name, result in ended:
                self._take(*self._ended(name, result))
            if running and self.clock() >= self._next_lease_check:
                self._next_lease_check = self.clock() + LEASE_SECONDS
                self._take(*self._overtaken())
        return self._result()

    def _take(self, *events: Event) -> None:
        """Advance the schedule by events and act on what steps enter, then by the events that this brings."""
        queue = deque(events)
        while queue:
            self._schedule = schedule.advance(self._schedule, queue.popleft())
            for state in self._schedule.entered:
                queue.extend(self._act(state))

    def _act(self, state: StepState) -> list[Event]:
        if state.phase is Phase.RUNNING:
            return self._launch(state)
        logger.info("%s is %s: %s", state.name, state.phase.value, state.reason)
        self._show(self.watcher.step, state.name, state.phase, state.reason)
        if state.phase is Phase.STOPPING:
            self.executor.cancel(state.name)
        elif state.phase.over and (claim := self._claims.get(state.name)):  # others need not wait for this run's end
            attempt_once(f"release the claim on {state.name}", lambda: self.store.release(claim))
        return []

    def _launch(self, state: StepState) -> list[Event]:
        """Take the right to run a step, and run it, unless a live run has that right or has used it meanwhile."""
        name, planned = state.name, self.plan.steps[state.name]
        try:
            claim = self.store.claim(planned.known.fingerprint, self.run)
            if isinstance(claim, Claim):
                self._claims[name] = claim
            newest = self.store.newest(planned.known.fingerprint)
        except (StillhouseError, *STORE_ERRORS) as error:
            return self._not_launched(state, _of_store(error))
        self._outages[name] = 0
        inputs = self._reads(planned)
        if newest and newest.generation > planned.seen_generation and not newest.manifest.outdated_input(inputs):
            self._commits[name] = newest
            self._shared.add(name)
            self._recorder.hit(name, newest, state.attempt)
            return [schedule.Committed(name, self.clock(), f"shared with run {newest.manifest.run}")]
        if isinstance(claim, Holder):
            reason = f"run {claim.run} on {claim.host} is running this step; waiting for its result"
            return [schedule.Postponed(name, self.clock(), Phase.HELD, reason, HELD_POLL_SECONDS)]
        self._recorder.opened(name, state.attempt, "miss")
        try:
            attempt = self._attempt(state, claim, inputs)
        except ExternalDataError as error:  # what is out of reach may come back
            return self._failed(name, state.attempt, Failure(FailureKind.TRANSIENT, str(error)))
        except Exception as error:  # noqa: BLE001  data from outside, its own code included: one step's trouble
            return self._failed(name, state.attempt, classify(error))
        self._show(self.watcher.step, name, Phase.RUNNING, f"attempt {state.attempt}" if state.attempt > 1 else "")
        self.executor.submit(attempt)
        return []

    def _not_launched(self, state: StepState, failure: Failure) -> list[Event]:
        """Wait for a store that fails, as long as a commit waits for it; only then an attempt is lost."""
        name, pauses = state.name, PAUSES_SECONDS[self._outages[state.name] :]
        if failure.kind is FailureKind.TRANSIENT and pauses:
            self._outages[name] += 1
            reason = f"{failure.message}; trying again in {pauses[0]:g} s"
            return [schedule.Postponed(name, self.clock(), Phase.BACKING_OFF, reason, pauses[0])]
        self._outages[name] = 0
        self._recorder.opened(name, state.attempt, "miss")
        return self._failed(name, state.attempt, failure)

    def _reads(self, planned: StepPlan) -> dict[str, InputCommit]:
        return input_commits(planned.step, planned.known, self._commits)

    def _attempt(self, state: StepState, claim: Claim, inputs: Mapping[str, InputCommit]) -> Attempt:
        planned = self.plan.steps[state.name]
        resolved = self._resolved.of(planned)

        def artifact(source: Source) -> Artifact:
            return self._commits[source.step].artifact if isinstance(source, Handle) else resolved.artifact(source)

        if changed := resolved.changed():
            raise StageFailed(changed)
        return Attempt(
            step=state.name,
            attempt=state.attempt,
            stage=resolved.stage,
            fingerprint=claim.fingerprint,
            inputs=planned.step.wired(artifact),
            out=self.store.out(claim),
            resume=self.store.resume(claim, inputs),
            logs=self._folder / "logs",
            resources=state.resources,
        )

    def _ended(self, name: str, result: AttemptResult | Failure) -> list[Event]:
        state = self._schedule.steps[name]
        ended = result if isinstance(result, Failure) else self._commit(name, result)
        if isinstance(ended, Failure):
            return self._failed(name, state.attempt, ended, "KILLED" if state.phase is Phase.STOPPING else "FAILED")
        claim, manifest = self._claims[name], ended.manifest
        self._commits[name] = ended
        attempt_once(f"forget what {name} kept in order to go on", lambda: self.store.forget_resume(claim))
        attempt_once(f"name {name}'s commit", lambda: self.store.point(self.plan.workflow.name, name, ended))
        took = {"seconds": manifest.seconds, "peak_memory_bytes": float(manifest.peak_memory_bytes)}
        metrics, tags = {**ended.artifact.metrics, **took}, {"artifact": self.store.out(claim).uri}
        self._recorder.closed(name, state.attempt, "FINISHED", metrics, tags)
        return [schedule.Committed(name, self.clock(), f"{manifest.seconds:.1f} s")]

    def _failed(self, name: str, attempt: int, failure: Failure, status: RunStatus = "FAILED") -> list[Event]:
        self._recorder.closed(name, attempt, status, {}, {"error": failure.message[:500]})
        return [schedule.Failed(name, self.clock(), failure)]

    def _commit(self, name: str, result: AttemptResult) -> Commit | Failure:
        planned, claim = self.plan.steps[name], self._claims[name]
        if changed := self._resolved.of(planned).changed():
            return Failure(FailureKind.PERMANENT, changed)
        stage = planned.step.stage
        manifest = Manifest(
            **asdict(claim),
            kind=stage.KIND,
            stage=type(stage).__name__,
            step=name,
            workflow=self.plan.workflow.name,
            run=self.run,
            files=result.files,
            metrics=dict(result.metrics),
            identity=dict(planned.known.record),
            inputs=self._reads(planned),
            resources=self._schedule.steps[name].resources,
            provenance=Provenance(**result.environment, **self._code[name]),
            seconds=result.seconds,
            peak_memory_bytes=result.peak_memory_bytes,
            created=time.time(),
        )
        try:
            return persist(f"commit {name}", lambda: self.store.commit(claim, manifest), self.interrupt)
        except (StillhouseError, *STORE_ERRORS) as error:
            return _of_store(error)

    def _overtaken(self) -> list[Event]:
        """Find the running steps that another run took over, as it may while this process is paused."""
        running = [state.name for state in self._schedule.in_phase(Phase.RUNNING)]
        with suppress(*STORE_ERRORS):  # looked at again soon; the commit looks in any case
            taken = [name for name in running if self.store.overtaken(self._claims[name])]
            return [schedule.Overtaken(name, self.clock()) for name in taken]
        return []

    def _pass_on(self, reports: ProgressUpdates) -> list[Event]:
        began: list[Event] = []
        for name, attempt in sorted(reports.started | reports.curves.keys()):
            state = self._schedule.steps.get(name)  # an executor may have served another run, whose steps started too
            if state and state.phase is Phase.RUNNING and state.attempt == attempt and state.began_at is None:
                began.append(schedule.Began(name, self.clock()))
        for (name, _), (done, total, unit) in reports.progress.items():
            self._show(self.watcher.progress, name, done, total, unit)
        for (name, attempt), points in reports.curves.items():
            self._recorder.curves(name, attempt, points)
        for name, _, text in reports.notes:
            self._show(self.watcher.note, name, text)
        return began

    def _show(self, show: Callable[..., None], *values: object) -> None:
        with suppress(Exception):  # a terminal that went away (`| head`) must not end a run
            show(*values)

    def _result(self) -> RunResult:
        results = {}
        for name, state in self._schedule.steps.items():
            hit, shared = self.plan.steps[name].status == "HIT", name in self._shared
            outcome = "hit" if hit else "shared" if shared else state.phase.value
            log = self._folder.uri_of(f"logs/{name}.{state.attempt}.log") if state.attempt and not shared else None
            results[name] = StepResult(name, outcome, state.reason, self._commits.get(name), log, state.attempt)
        return RunResult(self.run, results, self._schedule.succeeded, self._schedule.interrupted)


def _of_store(error: Exception) -> Failure:
    """Return the failure that the store's is: what it refuses for good is an error of ours, all else is transient."""
    ours = isinstance(error, StillhouseError)
    return classify(error) if ours else Failure(FailureKind.TRANSIENT, f"the store failed: {brief(error)}")
