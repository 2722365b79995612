"""A run's loop: what it launches, commits, records and goes on from."""

from collections.abc import Mapping
from itertools import count
from pathlib import Path
from threading import Event as Flag
from typing import Any

import pytest

from stages.contract import Resources
from stages.errors import ConfigError
from stages.external.checkpoints import Checkpoint
from tests.fakes import InlineTasks, SilentWatcher, drive
from tests.stages_for_tests import Join, Odd, Pour, Stumble, Write
from workflows.engine import events
from workflows.engine.driver import Driver
from workflows.engine.executor import Attempt, AttemptResult, Executor
from workflows.engine.failures import Failure, FailureKind
from workflows.engine.graph import Handle, Retry, Workflow
from workflows.engine.heartbeat import Holder
from workflows.engine.identity import Fingerprint
from workflows.engine.plan import Plan, make_plan
from workflows.engine.provenance import code_digest
from workflows.engine.retrying import PAUSES_SECONDS
from workflows.engine.schedule import Phase
from workflows.engine.store import ArtifactStore, Claim, cost_seconds

BROKEN = Failure(FailureKind.PERMANENT, "the flask broke")
LOST = Failure(FailureKind.WORKER_LOST, "the node died")
AT_ONCE = Retry(attempts=3, backoff_seconds=0)


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(str(tmp_path / "store"))


def graph() -> Workflow:
    flow = Workflow("flow")
    data = flow.step("data", Write(text="malt"), retry=AT_ONCE)
    first = flow.step("first", Join(mark="1:"), data=data, retry=AT_ONCE)
    flow.step("second", Join(mark="2:"), data=data, parts={"first": first}, retry=AT_ONCE)
    return flow


def text(store: ArtifactStore, step: str) -> str:
    commit = store.newest(store.resolve(f"flow/{step}"))
    assert commit is not None
    return commit.artifact.paths("text.txt")[0].read_text()


def test_drive_whole_graph_commits_each_step_once(store: ArtifactStore) -> None:
    tasks = InlineTasks()
    result, _ = drive(graph(), store, tasks)
    assert result.succeeded
    assert result.executed == 3
    assert tasks.submitted == ["data", "first", "second"]
    assert text(store, "second") == "2:malt+1:malt"


def test_drive_again_runs_nothing(store: ArtifactStore) -> None:
    drive(graph(), store, InlineTasks())
    tasks = InlineTasks()
    result, _ = drive(graph(), store, tasks)
    assert (tasks.submitted, result.executed, result.succeeded) == ([], 0, True)
    assert {step.outcome for step in result.steps.values()} == {"hit"}


def test_drive_lost_worker_is_tried_again_in_a_fresh_folder(store: ArtifactStore) -> None:
    tasks = InlineTasks({"first": [LOST, LOST]})
    result, _ = drive(graph(), store, tasks)
    assert result.succeeded
    assert result.steps["first"].attempts == 3
    assert [request.out.uri.rsplit("/", 1)[1] for request in tasks.requests if request.step == "first"] == [
        "000001",
        "000002",
        "000003",
    ]


def test_drive_attempts_spent_fails_the_step_and_skips_what_needs_it(store: ArtifactStore) -> None:
    result, _ = drive(graph(), store, InlineTasks({"first": [LOST] * 3}))
    assert not result.succeeded
    assert {name: step.outcome for name, step in result.steps.items()} == {
        "data": "committed",
        "first": "failed",
        "second": "skipped",
    }
    assert "the node died" in result.steps["first"].reason
    again, _ = drive(graph(), store, InlineTasks())
    assert again.executed == 2


def test_drive_out_of_memory_shrinks_the_micro_batch_and_keeps_the_fingerprint(
    store: ArtifactStore, tmp_path: Path
) -> None:
    flow = Workflow("flow")
    stage = Stumble(how="memory", times=2, counter=str(tmp_path / "tries"))
    flow.step("data", stage, resources=Resources(micro_batch=16), retry=AT_ONCE)
    result, _ = drive(flow, store, InlineTasks())
    assert result.succeeded
    assert text(store, "data") == "tries=3 micro_batch=4"
    assert make_plan(flow, store).steps["data"].status == "HIT"


def test_drive_permanent_failure_is_tried_once_and_names_its_log(store: ArtifactStore, tmp_path: Path) -> None:
    flow = Workflow("flow")
    flow.step("data", Stumble(how="permanent", counter=str(tmp_path / "tries")), retry=AT_ONCE)
    result, _ = drive(flow, store, InlineTasks())
    failed = result.steps["data"]
    assert failed.attempts == 1
    assert "the flask broke" in failed.reason
    assert failed.log is not None
    assert "StageFailed: the flask broke" in Path(failed.log).read_text()


def test_drive_goes_on_from_receipts_of_a_dead_attempt(store: ArtifactStore, tmp_path: Path) -> None:
    """The first attempt pours two shards and dies; the second pours only the others."""
    flow = Workflow("flow")
    log = tmp_path / "log"
    flow.step("data", Pour(log=str(log)), retry=AT_ONCE)
    fingerprint = make_plan(flow, store).steps["data"].fingerprint
    assert fingerprint is not None
    dead = store.claim(fingerprint, "run")
    assert isinstance(dead, Claim)
    from stages.contract import Shards

    shards = Shards(store.out(dead), store.resume(dead))
    for index in (0, 2):
        shards.write(f"shards/{index}.txt", f"shard {index}".encode(), {})
    result, _ = drive(flow, store, InlineTasks(), run="run")
    assert result.succeeded
    assert log.read_text().split() == ["1", "3"]
    commit = result.steps["data"].commit
    assert commit is not None
    assert [file.name for file in commit.artifact.files] == [f"shards/{index}.txt" for index in range(4)]
    assert store.resume(dead).entries() == [], "what was kept in order to go on is gone once it is committed"


def test_drive_fenced_out_result_is_not_committed_twice(store: ArtifactStore) -> None:
    """Another writer takes the step over while our attempt runs."""

    class Overtaken(InlineTasks):
        def submit(self, request):  # type: ignore[no-untyped-def]
            super().submit(request)
            if request.step == "data" and len(self.submitted) == 1:
                store.claim(request.fingerprint, "run")

    tasks = Overtaken()
    result, _ = drive(graph(), store, tasks)
    assert result.succeeded
    assert tasks.submitted.count("data") == 2
    commit = result.steps["data"].commit
    assert commit is not None
    assert commit.generation == 1


def test_drive_result_committed_by_another_run_meanwhile_is_shared(store: ArtifactStore) -> None:
    plan = make_plan(graph(), store)
    drive(graph(), store, InlineTasks(), run="other")
    tasks = InlineTasks()
    result = Driver(plan, store, tasks, "late", lambda record: None, SilentWatcher()).go()
    assert tasks.submitted == []
    assert {step.outcome for step in result.steps.values()} == {"shared"}
    assert result.succeeded


def test_drive_result_committed_between_look_and_claim_is_shared_and_its_claim_released(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = ArtifactStore.claim

    def late(self: ArtifactStore, fingerprint: Fingerprint, run: str) -> Claim | Holder:
        if run == "late" and store.newest(fingerprint) is None:
            drive(graph(), store, InlineTasks(), run="other")
        return take(self, fingerprint, run)

    plan = make_plan(graph(), store)
    fingerprints = [step.fingerprint for step in plan.steps.values() if step.fingerprint]
    monkeypatch.setattr(ArtifactStore, "claim", late)
    tasks = InlineTasks()
    result = Driver(plan, store, tasks, "late", lambda record: None, SilentWatcher()).go()
    assert tasks.submitted == []
    assert {step.outcome for step in result.steps.values()} == {"shared"}
    assert all(isinstance(store.claim(fingerprint, "another"), Claim) for fingerprint in fingerprints)


def test_drive_long_chain_committed_by_another_run_is_shared_whole(store: ArtifactStore) -> None:
    """Each shared step makes the next one ready at once: hundreds in a row must not nest."""
    flow = Workflow("flow")
    data = flow.step("data", Write())
    link = flow.step("link.0", Join(), data=data)
    for number in range(1, 400):
        link = flow.step(f"link.{number}", Join(mark="."), data=data, parts={"before": link})
    plan = make_plan(flow, store)
    drive(flow, store, InlineTasks(), run="other")
    result = Driver(plan, store, InlineTasks(), "late", lambda record: None, SilentWatcher()).go()
    assert {step.outcome for step in result.steps.values()} == {"shared"}


def test_drive_interrupted_before_it_begins_runs_nothing_and_can_go_on(store: ArtifactStore) -> None:
    flag = Flag()
    flag.set()

    class Slow(InlineTasks):
        def submit(self, request):  # type: ignore[no-untyped-def]
            self.submitted.append(request.step)

        def poll(self, timeout_seconds):  # type: ignore[no-untyped-def]
            return [(step, Failure(FailureKind.TRANSIENT, "cancelled")) for step in self.cancelled]

    tasks = Slow()
    plan = make_plan(graph(), store)
    result = Driver(plan, store, tasks, "run", lambda record: None, SilentWatcher(), flag).go()
    assert tasks.cancelled == ["data"]
    assert result.interrupted
    assert not result.succeeded
    again, _ = drive(graph(), store, InlineTasks())
    assert again.succeeded


def test_drive_records_every_attempt(store: ArtifactStore) -> None:
    _, recorded = drive(graph(), store, InlineTasks({"first": [LOST]}))
    opened = [(r.step, r.attempt) for r in recorded if isinstance(r, events.AttemptStarted)]
    closed = [(r.step, r.attempt, r.status) for r in recorded if isinstance(r, events.AttemptEnded)]
    assert opened == [("data", 1), ("first", 1), ("first", 2), ("second", 1)]
    assert closed == [
        ("data", 1, "FINISHED"),
        ("first", 1, "FAILED"),
        ("first", 2, "FINISHED"),
        ("second", 1, "FINISHED"),
    ]
    _, recorded = drive(graph(), store, InlineTasks())
    assert {r.cache for r in recorded if isinstance(r, events.AttemptStarted)} == {"hit"}


def test_drive_manifest_says_where_the_result_came_from(store: ArtifactStore) -> None:
    result, _ = drive(graph(), store, InlineTasks())
    commit = result.steps["second"].commit
    assert commit is not None
    manifest = commit.manifest
    assert set(manifest.inputs) == {"data", "parts[first]"}
    assert manifest.identity["config"] == {"mark": "2:"}
    assert manifest.provenance.python
    assert manifest.metrics == {"parts": 2.0}


def test_drive_corrupt_input_is_made_again_before_it_is_read(store: ArtifactStore) -> None:
    drive(graph(), store, InlineTasks(), only="data")
    fingerprint = store.resolve("flow/data")
    commit = store.newest(fingerprint)
    assert commit is not None
    Path(commit.artifact.files[0].uri).write_text("rot!")
    result, _ = drive(graph(), store, InlineTasks())
    assert result.succeeded
    assert text(store, "second") == "2:malt+1:malt"
    assert store.generations(fingerprint) == [2]


def test_drive_half_done_work_on_another_commit_of_an_input_is_not_gone_on_with(store: ArtifactStore) -> None:
    before, after = InlineTasks({"first": [BROKEN]}), InlineTasks()
    drive(graph(), store, before)
    commit = store.newest(store.resolve("flow/data"))
    assert commit is not None
    Path(commit.artifact.files[0].uri).write_text("rot!")
    drive(graph(), store, after)
    (old,) = [request.resume for request in before.requests if request.step == "first"]
    (new,) = [request.resume for request in after.requests if request.step == "first"]
    assert old.uri != new.uri


@pytest.mark.parametrize("harm", ["changed", "deleted"])
def test_drive_data_from_outside_that_moves_meanwhile_fails_its_step_alone(
    store: ArtifactStore, tmp_path: Path, harm: str
) -> None:
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    for name in ("config.json", "model.safetensors"):
        (teacher / name).write_text("{}")

    class Meanwhile(InlineTasks):
        def submit(self, request):  # type: ignore[no-untyped-def]
            super().submit(request)
            weights = teacher / "model.safetensors"
            weights.write_text("other") if harm == "changed" else weights.unlink(missing_ok=True)

    flow = graph()
    given = flow.external("teacher", Checkpoint(source=str(teacher)))
    flow.step("third", Join(), data=Handle("data", "dataset"), parts={"teacher": given}, retry=AT_ONCE)
    result, _ = drive(flow, store, Meanwhile())
    assert {name for name, step in result.steps.items() if step.outcome == "committed"} == {"data", "first", "second"}
    assert ("has changed since" if harm == "changed" else "no weights") in result.steps["third"].reason
    if harm == "changed":
        assert drive(flow, store, InlineTasks())[0].executed == 1


def test_drive_data_from_outside_that_changes_under_an_attempt_is_not_committed(
    store: ArtifactStore, tmp_path: Path
) -> None:
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    for name in ("config.json", "model.safetensors"):
        (teacher / name).write_text("{}")

    class Under(InlineTasks):
        def submit(self, request):  # type: ignore[no-untyped-def]
            super().submit(request)
            if request.step == "third":
                (teacher / "model.safetensors").write_text("other")

    flow = graph()
    given = flow.external("teacher", Checkpoint(source=str(teacher)))
    flow.step("third", Join(), data=Handle("data", "dataset"), parts={"teacher": given}, retry=AT_ONCE)
    result, _ = drive(flow, store, Under())
    assert result.steps["third"].outcome == "failed"
    assert "has changed since" in result.steps["third"].reason


def test_drive_checkpoints_from_outside_of_one_name_are_each_itself(store: ArtifactStore, tmp_path: Path) -> None:
    flow = graph()
    givens = {}
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_text(name)
        givens[name] = flow.external("base", Checkpoint(source=str(tmp_path / name)))
    flow.step("third", Join(), data=Handle("data", "dataset"), parts=givens)
    tasks = InlineTasks()
    drive(flow, store, tasks)
    (request,) = [request for request in tasks.requests if request.step == "third"]
    parts = request.inputs["parts"]
    assert isinstance(parts, Mapping)
    read = {name: part.paths("model/*.safetensors")[0].read_text() for name, part in parts.items()}
    assert read == {"one": "one", "two": "two"}


def test_drive_metric_that_is_no_number_fails_its_step_alone(store: ArtifactStore) -> None:
    flow = graph()
    flow.step("odd", Odd())
    result, _ = drive(flow, store, InlineTasks())
    assert result.executed == 3
    assert "metric 'loss' is nan, expected a finite number" in result.steps["odd"].reason


def test_drive_step_that_is_over_is_held_no_longer(store: ArtifactStore) -> None:
    """Else two runs of which each waits for a step that failed in the other would wait for ever."""
    result, _ = drive(graph(), store, tasks := InlineTasks({"first": [BROKEN]}), run="one")
    assert result.steps["first"].outcome == "failed"
    for request in tasks.requests:
        assert isinstance(store.claim(Fingerprint(request.fingerprint), "another"), Claim)


def test_drive_stage_that_tells_nothing_has_begun(store: ArtifactStore) -> None:
    class Listening(InlineTasks):
        started: set[tuple[str, int]] = set()

        def reports(self):  # type: ignore[no-untyped-def]
            found = super().reports()
            self.started |= found.started
            return found

    tasks = Listening()
    drive(graph(), store, tasks)
    assert tasks.started == {("data", 1), ("first", 1), ("second", 1)}


def test_cost_counts_each_step_before_a_result_once(store: ArtifactStore) -> None:
    result, _ = drive(graph(), store, InlineTasks())
    total = sum(step.commit.manifest.seconds for step in result.steps.values() if step.commit)
    assert cost_seconds(store, store.resolve("flow/second")) == pytest.approx(total)


class Failing:
    """A method of the store that fails some times, before or after it has done its work, and counts its calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, times: int, *, answer_lost: bool = False) -> None:
        self.calls, works = 0, getattr(ArtifactStore, name)

        def method(store: ArtifactStore, *values: Any, **options: Any) -> Any:
            self.calls += 1
            if self.calls > times:
                return works(store, *values, **options)
            if answer_lost:
                works(store, *values, **options)
            raise OSError("connection reset\nand a long dump")

        monkeypatch.setattr(ArtifactStore, name, method)


class Unhurried(Flag):
    """An interrupt on which nobody waits; it remembers for how long somebody would have."""

    def __init__(self) -> None:
        super().__init__()
        self.waited: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.waited.append(timeout or 0.0)
        return self.is_set()


def unhurried(plan: Plan, store: ArtifactStore, executor: Executor, watcher: Any = None) -> Driver:
    """Return a driver for which a tenth of a second goes by each time that it looks at the clock."""
    watcher, clock = watcher or SilentWatcher(), count(0.0, 0.1).__next__
    return Driver(plan, store, executor, "run", lambda record: None, watcher, Unhurried(), clock)


def down(*_: Any) -> Any:
    raise OSError("connection refused")


@pytest.mark.parametrize("answer_lost", [False, True], ids=["not done", "answer lost"])
@pytest.mark.parametrize("method", ["newest", "claim", "commit"])
def test_drive_store_that_fails_some_times_is_asked_again(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch, method: str, answer_lost: bool
) -> None:
    driver = unhurried(make_plan(graph(), store), store, executor := InlineTasks())
    Failing(monkeypatch, method, 3, answer_lost=answer_lost)
    result = driver.go()
    assert result.succeeded
    assert executor.submitted == ["data", "first", "second"], "no attempt is lost"
    assert all(step.attempts == 1 for step in result.steps.values())
    assert driver.interrupt.waited == (list(PAUSES_SECONDS[:3]) if method == "commit" else []), (
        "a launch blocks nothing"
    )


@pytest.mark.parametrize("method", ["point", "forget_resume", "release"])
def test_drive_store_that_fails_after_a_commit_is_logged_and_the_run_goes_on(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    driver = unhurried(make_plan(graph(), store), store, InlineTasks())
    Failing(monkeypatch, method, 2)
    assert driver.go().succeeded
    assert "the run goes on without" in caplog.text


@pytest.mark.parametrize("method", ["newest", "claim", "commit"])
def test_drive_store_that_stays_away_fails_the_one_attempt(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    driver = unhurried(make_plan(graph(), store), store, InlineTasks())
    Failing(monkeypatch, method, len(PAUSES_SECONDS) + 1)
    result = driver.go()
    assert result.succeeded
    assert result.steps["data"].attempts == 2


def test_drive_interrupted_while_the_store_is_away_is_cancelled_at_once(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Impatient(SilentWatcher):
        def step(self, name: str, phase: Phase, text: str) -> None:
            if phase is Phase.BACKING_OFF:
                driver.interrupt.set()

    flow = Workflow("flow")
    for number in range(3):
        flow.step(f"s{number}", Write(text=str(number)))
    driver = unhurried(make_plan(flow, store), store, InlineTasks(), Impatient())
    monkeypatch.setattr(ArtifactStore, "claim", down)
    result = driver.go()
    assert {step.outcome for step in result.steps.values()} == {"cancelled"}
    assert driver.clock() < 5


def test_drive_store_that_is_away_for_one_step_holds_up_no_other(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow = Workflow("flow")
    flow.step("away", Write(text="away"), retry=Retry(attempts=1))
    flow.step("near", Join(), data=flow.step("data", Write(text="near")))
    plan = make_plan(flow, store)
    claim = ArtifactStore.claim

    def refuse(self: ArtifactStore, fingerprint: Fingerprint, run: str) -> Claim | Holder:
        return down() if fingerprint == plan.steps["away"].fingerprint else claim(self, fingerprint, run)

    monkeypatch.setattr(ArtifactStore, "claim", refuse)
    watcher = SilentWatcher()
    result = unhurried(plan, store, InlineTasks(), watcher).go()
    assert {name: step.outcome for name, step in result.steps.items()} == {
        "away": "failed",
        "data": "committed",
        "near": "committed",
    }
    assert watcher.phases.index(("near", Phase.COMMITTED)) < watcher.phases.index(("away", Phase.FAILED))
    assert "the store failed: connection refused" in result.steps["away"].reason


@pytest.mark.parametrize("times", [1, 99])
def test_drive_interrupted_commit_is_tried_once_more_without_waiting(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    class Meanwhile(InlineTasks):
        def submit(self, request: Attempt) -> None:
            super().submit(request)
            flag.set()

    flag = Flag()
    failing = Failing(monkeypatch, "commit", times)
    plan = make_plan(graph(), store)
    result = Driver(plan, store, Meanwhile(), "run", lambda record: None, SilentWatcher(), flag).go()
    assert failing.calls == 2
    assert result.steps["data"].outcome == ("committed" if times == 1 else "cancelled")


def test_drive_code_that_is_edited_while_a_step_runs_is_not_what_its_manifest_names(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Meanwhile(InlineTasks):
        def submit(self, request: Attempt) -> None:
            super().submit(request)
            monkeypatch.setattr("workflows.engine.driver.code_evidence", broken)

    def broken(stage: type) -> dict[str, str]:
        raise SyntaxError("half saved")

    result, _ = drive(graph(), store, Meanwhile())
    assert result.succeeded
    commit = result.steps["data"].commit
    assert commit is not None
    assert commit.manifest.provenance.code_digest == code_digest(Write)


def test_drive_commit_of_an_older_version_met_on_the_way_fails_its_step_for_good(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: ArtifactStore, fingerprint: str) -> None:
        raise ConfigError("the manifest was written by another version of stillhouse")

    plan = make_plan(graph(), store)
    monkeypatch.setattr(ArtifactStore, "newest", refuse)
    result = Driver(plan, store, InlineTasks(), "run", lambda record: None, SilentWatcher()).go()
    assert "another version" in result.steps["data"].reason
    assert result.steps["data"].attempts == 1


def test_drive_watcher_that_raises_ends_nothing(store: ArtifactStore) -> None:
    class Gone:
        def __getattr__(self, name: str) -> Any:
            raise BrokenPipeError("stdout went away")

        def step(self, *values: Any) -> None:
            raise BrokenPipeError("stdout went away")

        progress = note = step

    assert unhurried(make_plan(graph(), store), store, InlineTasks(), Gone()).go().succeeded


def test_drive_step_that_another_run_took_over_is_stopped_and_shared(store: ArtifactStore) -> None:
    """This process was paused; meanwhile another run claimed the step, and now commits it."""
    now = [0.0]

    class Paused(InlineTasks):
        def submit(self, attempt: Attempt) -> None:
            self.submitted.append(attempt.step)

        def poll(self, timeout_seconds: float) -> list[tuple[str, AttemptResult | Failure]]:
            now[0] += 10
            if self.cancelled:
                drive(flow, store, InlineTasks(), run="run")
                return [("data", Failure(FailureKind.TRANSIENT, "cancelled"))]
            store.claim(plan.steps["data"].fingerprint, "run")  # type: ignore[arg-type]
            return []

    flow = Workflow("flow")
    flow.step("data", Write(text="malt"), retry=AT_ONCE)
    plan = make_plan(flow, store)
    executor, recorded = Paused(), []
    result = Driver(plan, store, executor, "run", recorded.append, SilentWatcher(), clock=lambda: now[0]).go()
    assert executor.cancelled == ["data"]
    assert executor.submitted == ["data"]
    assert result.steps["data"].outcome == "shared"
    (killed,) = [r for r in recorded if isinstance(r, events.AttemptEnded) and r.status == "KILLED"]
    assert killed.step == "data"
