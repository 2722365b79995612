"""HIT, MISS or BLOCKED, and why: each reason a person would look for."""

from functools import partial
from pathlib import Path
from threading import Event as Flag
from typing import Any

import pytest

from stages.contract import Resources
from stages.errors import ConfigError
from stages.external.checkpoints import Checkpoint
from tests.fakes import InlineTasks, drive
from tests.stages_for_tests import Join, Write
from workflows.engine import provenance
from workflows.engine.graph import Workflow
from workflows.engine.plan import ClusterResources, Plan, PlanInterrupted, make_plan, watch_hashing
from workflows.engine.store import ArtifactStore, Commit


def graph(text: str = "x", mark: str = "", **options: Any) -> Workflow:
    flow = Workflow("flow")
    data = flow.step("data", Write(text=text))
    first = flow.step("first", Join(mark=mark), data=data)
    flow.step("second", Join(), data=data, parts={"first": first}, **options)
    return flow


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(str(tmp_path / "store"))


def look(store: ArtifactStore, flow: Workflow, **options: Any) -> dict[str, tuple[str, str]]:
    plan: Plan = make_plan(flow, store, **options)
    return {name: (step.status, step.reason) for name, step in plan.steps.items()}


def newest(store: ArtifactStore, flow: Workflow, step: str) -> Commit:
    commit = make_plan(flow, store).steps[step].commit
    assert commit is not None
    return commit


def test_plan_empty_store_misses_all_and_says_what_waits(store: ArtifactStore) -> None:
    assert look(store, graph()) == {
        "data": ("MISS", "never run"),
        "first": ("MISS", "never run; waits for data"),
        "second": ("MISS", "never run; waits for data, first"),
    }


def test_plan_reads_only(store: ArtifactStore, tmp_path: Path) -> None:
    look(store, graph())
    assert not (tmp_path / "store").exists()


def test_plan_after_a_run_hits_all_with_estimates(store: ArtifactStore) -> None:
    drive(graph(), store, InlineTasks())
    plan = make_plan(graph(), store)
    assert [step.status for step in plan.steps.values()] == ["HIT"] * 3
    assert all(step.seconds_estimate is not None for step in plan.steps.values())


def test_plan_changed_field_names_it_and_what_follows_names_its_input(store: ArtifactStore) -> None:
    drive(graph(), store, InlineTasks())
    found = look(store, graph(mark="!"))
    assert found["data"][0] == "HIT"
    assert found["first"] == ("MISS", 'changed: mark: "" → "!"')
    assert found["second"] == ("MISS", "changed: input parts[first] (first)")


def test_plan_under_another_root_has_equal_fingerprints(store: ArtifactStore, tmp_path: Path) -> None:
    other = ArtifactStore(str(tmp_path / "elsewhere" / "store"))
    drive(graph(), store, InlineTasks())
    drive(graph(), other, InlineTasks())
    assert store.fingerprints() == other.fingerprints()


def test_plan_missing_file_is_a_miss_that_names_it(store: ArtifactStore) -> None:
    drive(graph(), store, InlineTasks())
    Path(newest(store, graph(), "first").artifact.files[0].uri).unlink()
    found = look(store, graph())
    assert found["first"] == ("MISS", "its commit does not verify: text.txt is missing")
    assert found["second"] == ("MISS", "first is run again")


def test_plan_withdrawn_commit_is_a_miss_with_its_reason(store: ArtifactStore) -> None:
    drive(graph(), store, InlineTasks())
    store.withdraw(newest(store, graph(), "data"), "text.txt is rotten")
    assert look(store, graph())["data"] == ("MISS", "its commit was withdrawn: text.txt is rotten")


def test_plan_newer_input_commit_is_a_miss(store: ArtifactStore) -> None:
    drive(graph(), store, InlineTasks())
    store.withdraw(newest(store, graph(), "first"), "for the test")
    drive(graph(), store, InlineTasks(), only="first")
    assert look(store, graph())["second"] == ("MISS", "first has a newer commit than the one this was made from")


def test_plan_deep_finds_same_size_rot_in_what_would_be_read(store: ArtifactStore) -> None:
    drive(graph(), store, InlineTasks(), only="data")
    Path(newest(store, graph(), "data").artifact.files[0].uri).write_text("y")
    assert look(store, graph())["data"][0] == "HIT", "sizes agree: a plan does not hash"
    found = look(store, graph(), watch=watch_hashing(None))
    assert found["data"] == ("MISS", "its commit was withdrawn: text.txt has another sha256 than its manifest names")


def test_plan_changed_code_is_told_and_with_strict_code_a_miss(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    drive(graph(), store, InlineTasks())
    monkeypatch.setattr("workflows.engine.plan.code_digest", lambda stage: "0" * 16)
    assert look(store, graph())["data"] == ("HIT", "committed, code changed since")
    found = look(store, graph(), strict_code=True)
    assert found["data"] == ("MISS", "the code of Write changed (--strict-code)")


def test_plan_lacking_resource_blocks_with_both_numbers(store: ArtifactStore) -> None:
    cluster = ClusterResources(cpus=4, gpus=1, largest_node_cpus=2, largest_node_gpus=1)
    wants = {
        "each of its workers needs 2 GPU, and the largest node of this machine has 1": Resources(gpus_per_worker=2),
        "it needs 3 GPU (3 workers × 1), and this machine has 1": Resources(workers=3, gpus_per_worker=1),
        "each of its workers needs 3 CPU, and the largest node of this machine has 2": Resources(cpus_per_worker=3),
    }
    for reason, resources in wants.items():
        assert look(store, graph(resources=resources), cluster=cluster)["second"] == ("BLOCKED", reason)


def test_plan_hit_is_not_blocked_by_what_it_would_need(store: ArtifactStore) -> None:
    drive(graph(), store, InlineTasks())
    cluster = ClusterResources(0.5, 0, 0.5, 0)
    assert look(store, graph(), cluster=cluster)["second"][0] == "HIT"


def test_plan_missing_outside_data_blocks_and_names_it(store: ArtifactStore, tmp_path: Path) -> None:
    flow = Workflow("flow")
    data = flow.step("data", Write())
    flow.step(
        "join", Join(), data=data, parts={"t": flow.external("teacher", Checkpoint(source=str(tmp_path / "gone")))}
    )
    status, reason = look(store, flow)["join"]
    assert status == "BLOCKED"
    assert "gone" in reason


def test_plan_only_a_step_leaves_out_what_it_does_not_need(store: ArtifactStore) -> None:
    assert list(look(store, graph(), only="first")) == ["data", "first"]


def test_plan_only_unknown_step_names_nearest(store: ArtifactStore) -> None:
    with pytest.raises(ConfigError, match="did you mean 'first'"):
        make_plan(graph(), store, only="frist")


def test_plan_old_layout_met_is_a_clear_error(store: ArtifactStore) -> None:
    fingerprint = make_plan(graph(), store).steps["data"].fingerprint
    assert fingerprint is not None
    old = {"schema": 1, "fingerprint": fingerprint, "files": []}
    (store.folder(fingerprint) / "commits").put_json("000001.json", old)
    with pytest.raises(ConfigError, match=r"another version of stillhouse .* use another store"):
        make_plan(graph(), store)


def test_plan_torn_commit_is_a_miss(store: ArtifactStore) -> None:
    drive(graph(), store, InlineTasks())
    fingerprint = store.resolve("flow/first")
    store.folder(fingerprint).put("commits/000001.json", b"")
    assert look(store, graph())["first"] == ("MISS", "never run")
    drive(graph(), store, InlineTasks())
    assert store.generations(fingerprint)[-1] == 2
    assert look(store, graph())["first"] == ("HIT", "committed")


def test_plan_deep_reports_what_it_hashes_does_it_once_and_can_be_stopped(
    store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("stages.external.digests.SETTLED_SECONDS", -1.0)
    drive(graph(), store, InlineTasks(), only="data")
    lines: list[str] = []
    flag = Flag()
    flag.set()
    with pytest.raises(PlanInterrupted, match="nothing was started"):
        make_plan(graph(), store, watch=watch_hashing(lines.append, flag))
    assert lines == []
    flag.clear()
    for _ in range(2):
        plan = make_plan(graph(), store, watch=watch_hashing(lines.append, flag))
    assert plan.steps["data"].status == "HIT"
    assert lines == ["verifying data: text.txt (0 MB read)"]


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """Return the folder of a small package whose stage imports in every way."""
    files = {
        "stages/__init__.py": "",
        "stages/verb/__init__.py": "",
        "stages/verb/stage.py": "import stages.one.plain\nfrom stages.two import thing\n"
        "def run():\n    from stages.verb.late import work\n    from .beside import near\n",
        "stages/verb/late.py": "from stages.three import (\n    deep,  # why\n)\n",
        "stages/verb/beside.py": "near = 1\n",
        "stages/one/__init__.py": "",
        "stages/one/plain.py": "import json\n",
        "stages/two/__init__.py": "from stages.two.thing import it\n",
        "stages/two/thing.py": "it = 1\n",
        "stages/three/__init__.py": "",
        "stages/three/deep.py": "import stages.verb.stage\n",
        "stages/other/__init__.py": "",
        "stages/other/unrelated.py": "from stages.verb import stage\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_code_of_a_stage_is_all_that_it_imports_of_ours_and_nothing_else(package: Path) -> None:
    found = provenance.code_files(package / "stages/verb/stage.py", package)
    assert {file.relative_to(package / "stages").as_posix() for file in found} == {
        "__init__.py",
        "verb/__init__.py",
        "verb/stage.py",
        "verb/late.py",
        "verb/beside.py",
        "one/__init__.py",
        "one/plain.py",
        "two/__init__.py",
        "two/thing.py",
        "three/__init__.py",
        "three/deep.py",
    }


@pytest.mark.parametrize(
    ("changed", "differs"),
    [("three/deep.py", True), ("verb/beside.py", True), ("other/unrelated.py", False)],
)
def test_code_digest_changes_with_a_shared_module_and_with_no_unrelated_one(
    package: Path, monkeypatch: pytest.MonkeyPatch, changed: str, differs: bool
) -> None:
    def digest() -> str:
        provenance.code_digest.cache_clear()
        provenance._imported_files.cache_clear()
        return provenance.code_digest(Write)

    monkeypatch.setattr(provenance, "code_files", partial(provenance.code_files, root=package))
    monkeypatch.setattr(provenance.inspect, "getfile", lambda stage: str(package / "stages/verb/stage.py"))
    before = digest()
    with (package / "stages" / changed).open("a") as file:
        file.write("changed = 1\n")
    assert (digest() != before) == differs
    provenance.code_digest.cache_clear()


def test_code_digest_of_a_half_saved_file_is_of_its_bytes(tmp_path: Path) -> None:
    whole, half, gone = tmp_path / "whole.py", tmp_path / "half.py", tmp_path / "gone.py"
    whole.write_text("import half\nimport gone\n")
    half.write_text("import os\nclass Half(\n")
    assert provenance.code_files(whole, tmp_path) == {whole, half}
    assert provenance.code_files(gone, tmp_path) == {gone}


def test_code_digest_of_our_stages_covers_what_they_share() -> None:
    train = provenance.code_files(provenance.ROOT / "stages/train/stage.py")
    for name in ("stages/contract.py", "stages/storage.py", "stages/models/checkpoints.py", "stages/train/loop.py"):
        assert provenance.ROOT / name in train
    assert provenance.ROOT / "stages/quantize/stage.py" not in train
    assert provenance.code_digest(Write) == provenance.code_digest(Join), "they share a file"
