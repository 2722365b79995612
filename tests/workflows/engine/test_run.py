"""One run from its announcement to MLflow, with work that is done in this process."""

import getpass
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from stages.contract import Artifact, Context, Input, Outcome, Stage
from stages.errors import ConfigError
from stages.formats.report import Report, ReportedCandidate, Verdict
from stages.storage import cache_root
from tests.fakes import InlineTasks, SilentWatcher, unwatched
from tests.mlflow_stub import USER_LOGIN, mlflow_stub
from tests.stages_for_tests import Join, Write
from workflows.engine import retrying
from workflows.engine import run as run_module
from workflows.engine.events import EventLog, RunEnded, RunEvent
from workflows.engine.graph import Workflow
from workflows.engine.heartbeat import Holder
from workflows.engine.plan import Plan
from workflows.engine.run import Execution, Settings, execute
from workflows.engine.store import ArtifactStore
from workflows.engine.tracking.tracker import TrackerState
from workflows.engine.tracking.tracking_uri import known_tracking_uris


class Judge(Stage):
    """Leaves a report with one candidate."""

    KIND = "report"
    REVISION = "2026-11-25 first"
    INPUTS = {"scores": Input("dataset")}

    def run(self, context: Context) -> Outcome:
        fingerprint = context.one("scores").fingerprint
        candidate = ReportedCandidate(
            name="student", fingerprint=fingerprint, folder="model", uri="/store/model", kind="distilled", base=None,
            params={"method": "none"}, metrics={"final/kl_to_teacher": 0.2}, intervals={}, notes={},
        )  # fmt: skip
        verdict = Verdict(
            outcome="accepted",
            champion="student",
            registered_name="tiny",
            reasons=("it is good",),
            claims=(),
            checks={},
        )
        report = Report(
            verdict=verdict, reference=None, split="validation", tokens=10, documents=1, effective_documents=1,
            dtype="float32", minimum_detectable_nats=0.1, candidates=(candidate,),
        )  # fmt: skip
        report.write(context.out)
        return Outcome()


def graph() -> Workflow:
    flow = Workflow("flow")
    data = flow.step("data", Write(text="malt"))
    flow.step("report", Judge(), scores=data)
    return flow


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> InlineTasks:
    """Work that is done in this process, where a run would start Ray."""
    made = InlineTasks()
    monkeypatch.setattr(run_module, "RayExecutor", lambda **_: made)
    return made


def run_it(store: Path, flow: Workflow | None = None, watch: Any = unwatched, **settings: Any) -> Execution:
    return execute(
        flow or graph(),
        Settings(store=str(store), **settings),
        watch=watch,
        interrupt=threading.Event(),
        params={"text": "malt"},
        command="stillhouse run flow",
    )


def test_execute_keeps_what_happened_in_the_store_and_in_mlflow(tmp_path: Path, tasks: InlineTasks) -> None:
    execution = run_it(tmp_path / "store")
    assert execution.result.succeeded
    assert (execution.tracking.waiting, execution.tracking.error) == (0, None)
    report = execution.reports["report"]
    assert report.verdict.champion == "student"
    assert report.candidates[0].metrics["final/cost_seconds"] >= 0
    root = ArtifactStore(str(tmp_path / "store")).root
    happened = [event.type for event in EventLog(root / "runs" / execution.result.run / "events").read_all()]
    assert happened == [
        "run_started", "attempt_started", "attempt_ended", "attempt_started", "attempt_ended",
        "report_made", "run_ended",
    ]  # fmt: skip
    again = run_it(tmp_path / "store")
    assert {step.outcome for step in again.result.steps.values()} == {"hit"}
    assert again.tracking.waiting == 0


def test_execute_announces_itself_before_it_plans(
    tmp_path: Path, tasks: InlineTasks, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    plan = run_module.make_plan

    def planning(workflow: Workflow, store: ArtifactStore, **options: Any) -> Plan:
        (run,) = (store.root / "runs").children()
        seen.append(store.liveness.run_alive(run))
        return plan(workflow, store, **options)

    monkeypatch.setattr(run_module, "make_plan", planning)
    run_it(tmp_path / "store")
    assert seen == [True]


def test_execute_refused_run_leaves_nothing(tmp_path: Path, tasks: InlineTasks) -> None:
    flow = Workflow("flow")
    flow.step("joined", Join(), data=flow.step("data", Write(text="malt")))
    with pytest.raises(ConfigError):
        run_it(tmp_path / "store", flow, only="nothing")
    assert not (tmp_path / "store" / "runs").exists() or not list((tmp_path / "store" / "runs").iterdir())


def test_execute_store_remembers_where_its_runs_went_without_the_password(tmp_path: Path, tasks: InlineTasks) -> None:
    uri = f"sqlite:///{tmp_path}/elsewhere.db"
    run_it(tmp_path / "store", tracking_uri=uri)
    run_it(tmp_path / "store")
    root = ArtifactStore(str(tmp_path / "store")).root
    assert known_tracking_uris(root) == [f"sqlite:///{root.uri}/mlflow/mlflow.db", uri]


def test_execute_tracking_uri_that_is_refused_is_not_remembered(tmp_path: Path, tasks: InlineTasks) -> None:
    with pytest.raises(ConfigError, match="htp://mlflow:5000"):
        run_it(tmp_path / "store", tracking_uri="htp://mlflow:5000")
    assert known_tracking_uris(ArtifactStore(str(tmp_path / "store")).root) == []


@dataclass
class Recording:
    """A tracker that no MLflow is behind."""

    warned: str
    events: list[RunEvent]

    def record(self, event: RunEvent) -> None:
        self.events.append(event)

    def close(self, _: float) -> TrackerState:
        return TrackerState()


@pytest.mark.parametrize("login", [None, USER_LOGIN], ids=["no proxy", "no credentials"])
def test_execute_tells_before_its_plan_what_mlflow_will_not_get_and_goes_on(
    tmp_path: Path,
    tasks: InlineTasks,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    login: str | None,
) -> None:
    warned, plan, trackers = list[str](), run_module.make_plan, list[Recording]()

    def planning(*args: Any, **options: Any) -> Plan:
        warned[:] = caplog.messages
        return plan(*args, **options)

    def tracker(*, warned: str, **_: object) -> Recording:
        trackers.append(Recording(warned, []))
        return trackers[0]

    monkeypatch.setattr(run_module, "make_plan", planning)
    monkeypatch.setattr(run_module, "RunTracker", tracker)
    with mlflow_stub(login=login, locations={"other": "file:///srv/mlruns/0"}) as uri:
        execution = run_it(tmp_path / "store", tracking_uri=uri)
    assert execution.result.succeeded
    assert warned == [trackers[0].warned]
    assert trackers[0].events
    if login is None:
        assert execution.not_sent == warned[0]
        assert "--serve-artifacts" in warned[0]
    else:
        assert execution.not_sent == ""
        assert re.search("answered 401 .*MLFLOW_TRACKING_USERNAME.*work goes on", warned[0])


def fail_to_read_reports(monkeypatch: pytest.MonkeyPatch, *, times: int) -> None:
    read, left = Report.read, [times]

    def failing(artifact: Artifact) -> Report:
        left[0] -= 1
        if left[0] >= 0:
            raise OSError("connection reset")
        return read(artifact)

    monkeypatch.setattr(Report, "read", failing)
    monkeypatch.setattr(retrying, "PAUSES_SECONDS", (0.0, 0.0))


def last_event(store: Path) -> RunEvent:
    root = ArtifactStore(str(store)).root
    (run,) = (root / "runs").children()
    return EventLog(root / "runs" / run / "events").read_all()[-1]


def test_execute_report_that_is_read_at_the_second_try_is_recorded(
    tmp_path: Path, tasks: InlineTasks, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_to_read_reports(monkeypatch, times=1)
    assert run_it(tmp_path / "store").reports["report"].verdict.champion == "student"
    ended = last_event(tmp_path / "store")
    assert isinstance(ended, RunEnded)
    assert ended.status == "FINISHED"


def test_execute_report_that_cannot_be_read_ends_the_run_as_failed(
    tmp_path: Path, tasks: InlineTasks, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_to_read_reports(monkeypatch, times=99)
    with pytest.raises(OSError, match="reset"):
        run_it(tmp_path / "store")
    ended = last_event(tmp_path / "store")
    assert isinstance(ended, RunEnded)
    assert (ended.status, "connection reset" in ended.note) == ("FAILED", True)


def test_execute_user_without_a_name_is_a_number(
    tmp_path: Path, tasks: InlineTasks, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found: 1234")

    monkeypatch.setattr(getpass, "getuser", nobody)
    monkeypatch.setattr(os, "getuid", lambda: 1234)
    execution = run_it(tmp_path / "store")
    events = EventLog(ArtifactStore(str(tmp_path / "store")).root / "runs" / execution.result.run / "events")
    (started, *_) = events.read_all()
    assert started.user == "1234"  # type: ignore[union-attr]


def test_execute_failing_watcher_still_ends_the_run_for_others(tmp_path: Path, tasks: InlineTasks) -> None:
    @contextmanager
    def broken(_: Plan) -> Iterator[SilentWatcher]:
        raise OSError("the terminal is gone")
        yield

    with pytest.raises(OSError, match="terminal"):
        run_it(tmp_path / "store", watch=broken)
    root = ArtifactStore(str(tmp_path / "store")).root
    (run,) = (root / "runs").children()
    assert (root / "runs" / run).has("published.json")
    holder = Holder.from_json((root / "runs" / run).get_json("heartbeat.json"))
    assert holder == replace(Holder.of_this_process(run))


def test_cache_root_user_without_a_home_has_a_place_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("STILLHOUSE_CACHE", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert cache_root().name == f"stillhouse-{os.getuid()}"
