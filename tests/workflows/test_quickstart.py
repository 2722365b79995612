"""The whole quickstart, made short by its parameters: run, read back, run again, harmed, run again."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient

from tests.workflows.engine.tracking.place import answers, free_port
from tests.workflows.run_command import fingerprints, run, short_quickstart, start, until
from workflows.engine.tracking.view import RUN

pytestmark = [pytest.mark.quickstart, pytest.mark.timeout(600)]

STEPS = [
    "corpus",
    "teacher",
    "train.plain",
    "signals",
    "train.distilled",
    "quantize.distilled",
    "scores",
    "speed",
    "verdict",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quickstart")


@pytest.fixture(scope="module")
def command(folder: Path) -> tuple[str, ...]:
    return ("run", *short_quickstart(), "--store", str(folder / "store"))


@pytest.fixture(scope="module")
def document(command: tuple[str, ...], folder: Path) -> Any:
    return run(*command, cwd=folder)


def tracked(folder: Path) -> tuple[MlflowClient, list[Any]]:
    client = MlflowClient(f"sqlite:///{folder}/store/mlflow/mlflow.db")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return client, list(client.search_runs(experiments, max_results=1000))


def of_kind(runs: list[Any], kind: str) -> list[Any]:
    return [found for found in runs if found.data.tags.get("kind") == kind]


def test_quickstart_runs_every_step_and_judges_every_candidate(document: Any) -> None:
    assert document["outcome"] == "succeeded"
    assert document["executed"] == len(STEPS)
    assert sorted(step["name"] for step in document["steps"]) == sorted(STEPS)
    names = [candidate["name"] for candidate in document["candidates"]]
    assert {"teacher", "plain", "distilled"} <= set(names)
    assert sum(name.startswith("distilled.") for name in names) >= 1
    for candidate in document["candidates"]:
        metrics = candidate["metrics"]
        weights = list(Path(candidate["artifact"]).glob("*.safetensors"))
        assert metrics["final/size_bytes"] == sum(path.stat().st_size for path in weights) > 0
        assert metrics["final/perplexity"] > 1
        assert ("final/latency_p50_ms" in metrics) == (not candidate["name"].startswith("distilled."))
    teacher = next(candidate for candidate in document["candidates"] if candidate["name"] == "teacher")
    assert teacher["metrics"]["final/kl_to_teacher"] == 0
    assert document["verdict"]["outcome"] in ("accepted", "rejected")


def test_quickstart_leaves_nothing_in_the_current_folder_but_the_store(document: Any, folder: Path) -> None:
    assert os.listdir(folder) == ["store"]


def test_quickstart_is_in_mlflow_as_it_was(document: Any, folder: Path) -> None:
    _, runs = tracked(folder)
    (workflow,) = [found for found in of_kind(runs, "workflow") if found.data.tags[RUN] == document["run"]]
    assert workflow.info.status == "FINISHED"
    steps = [found for found in of_kind(runs, "step") if found.data.tags[RUN] == document["run"]]
    assert sorted(step.data.tags["step"] for step in steps) == sorted(STEPS)
    assert {step.data.tags["mlflow.parentRunId"] for step in steps} == {workflow.info.run_id}
    published = {found.data.tags["candidate"]: found.data.metrics for found in of_kind(runs, "candidate")}
    assert published == {c["name"]: pytest.approx(c["metrics"], rel=1e-6) for c in document["candidates"]}
    trained = next(step for step in steps if step.data.tags["step"] == "teacher")
    assert trained.data.metrics["train/parameters"] > 0


def shown_by_chromium(url: str, profile: Path) -> str:
    """Return the page as Chromium has drawn it after some seconds."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    options += ["--disable-component-update", "--disable-sync", "--disable-quic", "--window-size=1900,900"]
    command = ["chromium", *options, f"--user-data-dir={profile}", "--virtual-time-budget=20000", "--dump-dom", url]
    return subprocess.run(command, capture_output=True, text=True, timeout=120).stdout


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")
def test_ui_shows_the_candidates_side_by_side_and_ends_when_told(document: Any, folder: Path, tmp_path: Path) -> None:
    port = free_port()
    process = start("ui", "--store", str(folder / "store"), "--port", str(port))
    try:
        until(lambda: answers(f"http://127.0.0.1:{port}/health"), of=process)
        assert process.stdout is not None
        page = next(found[0] for line in process.stdout if (found := re.search(r"http://\S+=candidates", line)))
        wanted = {candidate["name"] for candidate in document["candidates"]}
        wanted |= {f"final/{figure}" for figure in ("kl_to_teacher", "agreement", "perplexity", "size_bytes")}
        until(lambda: wanted <= set(re.findall(r">([^<>]+)<", shown_by_chromium(page, tmp_path / "profile"))))
    finally:
        server = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        process.terminate()
        _, alive = psutil.wait_procs(server, timeout=20)
    assert not alive


def test_second_run_runs_nothing_and_changes_no_candidate(
    document: Any, command: tuple[str, ...], folder: Path
) -> None:
    client, before = tracked(folder)
    versions = [version.version for version in client.search_model_versions()]
    again = run(*command, cwd=folder)
    assert again["executed"] == 0
    assert {step["outcome"] for step in again["steps"]} == {"hit"}
    assert fingerprints(again) == fingerprints(document)
    assert again["verdict"] == document["verdict"]
    client, after = tracked(folder)
    assert len(of_kind(after, "candidate")) == len(of_kind(before, "candidate"))
    assert len(of_kind(after, "workflow")) == len(of_kind(before, "workflow")) + 1
    assert [version.version for version in client.search_model_versions()] == versions


def test_harmed_artifact_is_withdrawn_and_only_it_and_what_follows_run_again(
    document: Any, command: tuple[str, ...], folder: Path
) -> None:
    shown = run("artifacts", "show", "quickstart/scores", "--store", str(folder / "store"))
    scores = next(file["uri"] for file in shown["files"] if file["name"] == "scores.json")
    text = Path(scores).read_text()
    Path(scores).write_text(text.replace("a", "b", 1))
    found = run("artifacts", "verify", "--store", str(folder / "store"), exit_code=1)
    assert [row["step"] for row in found["artifacts"] if row["problems"]] == ["scores"]
    plan = {step["name"]: step["status"] for step in run("plan", *command[1:])["steps"]}
    assert {name for name, status in plan.items() if status == "MISS"} == {"scores", "verdict"}
    again = run(*command, cwd=folder)
    assert again["executed"] == 2
    assert fingerprints(again) == fingerprints(document)


def test_changed_option_runs_only_what_depends_on_it(document: Any, command: tuple[str, ...]) -> None:
    plan = run("plan", *command[1:], "--gate.max-kl-to-base", "0.5")
    assert {step["name"] for step in plan["steps"] if step["status"] == "MISS"} == {"verdict"}
    (verdict,) = [step for step in plan["steps"] if step["name"] == "verdict"]
    assert "max_kl_to_base" in verdict["reason"]


def test_gc_keeps_what_the_runs_are_made_of(document: Any, folder: Path) -> None:
    store = str(folder / "store")
    assert run("artifacts", "gc", "--yes", "--store", store)["collected"] == []
    assert len(run("artifacts", "list", "--store", store)["artifacts"]) == len(STEPS)
