"""What a person sees while a run goes, and of a plan."""

from pathlib import Path

from tests.stages_for_tests import Join, Write
from workflows.command.output import console
from workflows.command.terminal import LiveWatcher, plan_table
from workflows.engine.graph import Workflow
from workflows.engine.plan import Plan, make_plan
from workflows.engine.schedule import Phase
from workflows.engine.store import ArtifactStore


def plan_of(tmp_path: Path, text: str = "malt") -> tuple[Plan, ArtifactStore]:
    flow, store = Workflow("flow"), ArtifactStore(str(tmp_path / "store"))
    data = flow.step("data", Write(text=text))
    flow.step("joined", Join(), data=data)
    return make_plan(flow, store), store


def shown(value: object) -> str:
    out = console()
    with out.capture() as captured:
        out.print(value)
    return captured.get()


def test_live_view_shows_the_brackets_of_an_error_as_they_are(tmp_path: Path) -> None:
    plan, _ = plan_of(tmp_path)
    watcher = LiveWatcher(console(quiet=True), plan)
    watcher.step("data", Phase.BACKING_OFF, "[/pytorch/third_party/gloo] Connection closed by peer :warning:")
    assert "[/pytorch/third_party/gloo] Connection closed by peer :warning:" in shown(watcher)


def test_plan_shows_the_brackets_of_an_input_as_they_are(tmp_path: Path) -> None:
    plan, _ = plan_of(tmp_path)
    step = plan.steps["joined"]
    object.__setattr__(step, "reason", "changed: input parts[first] (first)")
    assert "parts[first]" in shown(plan_table(plan))
