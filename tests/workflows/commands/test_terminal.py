"""What a person sees while a run goes, and of a plan."""

import io
import os
from pathlib import Path

import pytest
from rich.console import Console

from tests.stages_for_tests import Join, Write
from workflows.commands.output import LastingConsole, console, print_json
from workflows.commands.plan import plan_table
from workflows.commands.terminal import LiveWatcher, progress_line
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


def test_live_view_on_a_narrow_terminal_keeps_names_and_times_whole(tmp_path: Path) -> None:
    plan, _ = plan_of(tmp_path)
    watcher = LiveWatcher(console(quiet=True), plan)
    watcher.step("data", Phase.RUNNING, "")
    watcher.note("data", "a long story " * 20)
    out = Console(width=40, force_terminal=True, color_system=None)
    with out.capture() as captured:
        out.print(watcher)
    first, second = captured.get().splitlines()
    assert first.split()[:4] == ["▶", "data", "0.0", "s"]
    assert first.rstrip().endswith("…")
    assert second.split() == ["·", "joined"]


def test_live_view_whose_reader_went_away_goes_on_unseen(tmp_path: Path) -> None:
    plan, _ = plan_of(tmp_path)
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe:
        watcher = LiveWatcher(LastingConsole(file=pipe), plan)
        for phase in (Phase.RUNNING, Phase.COMMITTED):
            watcher.step("data", phase, "")
    assert watcher.rows["data"].phase is Phase.COMMITTED


def test_json_document_whose_reader_went_away_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe:
        monkeypatch.setattr("sys.stdout", pipe)
        print_json({"steps": []})


def test_waiting_for_another_run_is_printed_once_where_lines_stay(tmp_path: Path) -> None:
    plan, _ = plan_of(tmp_path)
    out = Console(width=80, file=io.StringIO())
    watcher = LiveWatcher(out, plan)
    for _ in range(5):
        watcher.step("data", Phase.HELD, "run a is running this step")
    watcher.step("data", Phase.RUNNING, "")
    assert out.file.getvalue().count("run a is running this step") == 1  # type: ignore[attr-defined]


def test_verifying_prints_a_line_now_and_then_where_lines_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    out = Console(width=80, file=io.StringIO())
    with progress_line(out, "planning") as show:
        show("verifying data: text.txt (8 MB read)")
        monkeypatch.setattr("workflows.commands.terminal.LINE_SECONDS", -1.0)
        show("verifying data: text.txt (16 MB read)")
    assert out.file.getvalue() == "verifying data: text.txt (16 MB read)\n"  # type: ignore[attr-defined]


def test_plan_shows_the_brackets_of_an_input_as_they_are(tmp_path: Path) -> None:
    plan, _ = plan_of(tmp_path)
    step = plan.steps["joined"]
    object.__setattr__(step, "reason", "changed: input parts[first] (first)")
    assert "parts[first]" in shown(plan_table(plan))


def test_running_step_without_a_terminal_gets_a_line_with_how_far_it_is_and_how_long_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, _ = plan_of(tmp_path)
    clock = iter([100.0, 100.0, 110.0, 130.0])
    monkeypatch.setattr("workflows.commands.terminal.time.monotonic", lambda: next(clock))
    out = Console(file=io.StringIO(), width=200)
    watcher = LiveWatcher(out, plan)
    watcher.step("data", Phase.RUNNING, "")
    watcher.progress("data", 0, 4_000, "tokens")
    watcher.step("joined", Phase.WAITING, "")
    watcher.progress("data", 1_000, 4_000, "tokens")
    clock = iter([120.0])
    watcher.print_running()
    (line,) = [line for line in out.file.getvalue().splitlines() if "25%" in line]
    assert line.strip() == "data 20 s: 25% of 4,000 tokens, 50 tokens/s, 1 min 0 s left"
