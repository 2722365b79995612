"""Garbage collection for real: what it deletes, and what it must not."""

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.fakes import InlineTasks, drive
from tests.stages_for_tests import Join, Write
from workflows.engine.gc import Garbage, StoreBusy, delete, find_garbage
from workflows.engine.graph import Workflow
from workflows.engine.heartbeat import Holder
from workflows.engine.store import ArtifactStore
from workflows.engine.tracking.connection import connect
from workflows.engine.tracking.publisher import mark_published
from workflows.engine.tracking.tracking_uri import TrackingUnavailable, default_tracking_uri, remember_tracking_uri

OLD, NEW, STARTING = "20260101-000000-aaaaaa", "20260102-000000-bbbbbb", "20260103-000000-cccccc"
HOUR = 3600.0


def graph(text: str) -> Workflow:
    flow = Workflow("flow")
    data = flow.step("data", Write(text=text))
    flow.step("joined", Join(), data=data)
    return flow


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    """Two runs of different texts, whose drivers are gone."""
    made = ArtifactStore(str(tmp_path / "store"))
    for run, text in ((OLD, "malt"), (NEW, "rye")):
        drive(graph(text), made, InlineTasks(), run=run)
        gone = replace(Holder.of_this_process(run), started=0.0)
        (made.root / "runs" / run).put_json("heartbeat.json", gone.to_json())
        (made.root / "runs" / run).put_json("events/000001.json", {})
    connect(default_tracking_uri(made.uri), made.uri)
    return made


def found(store: ArtifactStore, *, keep_runs: int = 1, min_age_seconds: float = 0.0, uri: str | None = None) -> Garbage:
    return find_garbage(store, tracking_uri=uri, keep_runs=keep_runs, min_age_seconds=min_age_seconds)


def collected(store: ArtifactStore, *, keep_runs: int = 1) -> list[str]:
    """Delete what is garbage, and return what it was."""
    garbage = found(store, keep_runs=keep_runs)
    delete(store, garbage)
    return sorted(item.text for item in garbage.items)


def statuses(store: ArtifactStore, text: str) -> set[str]:
    return {step.outcome for step in drive(graph(text), store, InlineTasks(), run="later")[0].steps.values()}


def fingerprint_of(store: ArtifactStore, step: str, run: str) -> str:
    commits = [commit for commit in map(store.newest, store.fingerprints()) if commit]
    (only,) = [c.fingerprint for c in commits if (c.manifest.step, c.manifest.run) == (step, run)]
    return only


def announce(store: ArtifactStore, run: str) -> None:
    """Do what a run does before it plans."""
    (store.root / "runs" / run).put_json("heartbeat.json", Holder.of_this_process(run).to_json())


def test_gc_deletes_what_no_kept_run_reaches_and_nothing_else(store: ArtifactStore) -> None:
    garbage = found(store)
    assert sorted(item.text for item in garbage.items) == ["flow/data", "flow/joined"]
    assert all(item.size_bytes > 0 for item in garbage.items)
    assert len(store.fingerprints()) == 4, "finding deletes nothing"
    delete(store, garbage)
    assert collected(store) == []
    assert len(store.fingerprints()) == 2
    assert statuses(store, "rye") == {"hit"}
    assert statuses(store, "malt") == {"committed"}


def test_gc_keeps_what_a_pinned_artifact_is_made_of(store: ArtifactStore) -> None:
    store.pin(store.resolve(fingerprint_of(store, "joined", OLD)), "shipped")
    assert collected(store) == []
    assert statuses(store, "malt") == {"hit"}


def test_gc_keeps_what_a_living_run_uses_however_old(store: ArtifactStore) -> None:
    announce(store, OLD)
    assert collected(store, keep_runs=0) == ["flow/data", "flow/joined"]
    assert statuses(store, "malt") == {"hit"}


def test_gc_while_a_run_is_starting_is_refused_by_its_name(store: ArtifactStore) -> None:
    announce(store, STARTING)
    with pytest.raises(StoreBusy, match=STARTING):
        found(store)


def test_gc_deletes_nothing_where_a_run_began_after_it_looked(store: ArtifactStore) -> None:
    garbage = found(store)
    announce(store, STARTING)
    with pytest.raises(StoreBusy, match=STARTING):
        delete(store, garbage)
    assert statuses(store, "malt") == {"hit"}
    commits = [commit for commit in map(store.newest, store.fingerprints()) if commit]
    assert [problem for commit in commits for problem in store.problems(commit, lambda path, num_bytes: None)] == []


def test_gc_counts_the_newest_runs_by_those_that_came_to_read_something(store: ArtifactStore) -> None:
    refused = replace(Holder.of_this_process(STARTING), started=0.0)
    (store.root / "runs" / STARTING).put_json("heartbeat.json", refused.to_json())
    assert found(store).kept_runs == (NEW,)


def test_gc_keeps_what_is_younger_than_the_minimum_age(store: ArtifactStore) -> None:
    assert found(store, min_age_seconds=HOUR).items == ()
    age(store, "artifacts", fingerprint_of(store, "joined", OLD), seconds=2 * HOUR)
    assert [item.text for item in found(store, min_age_seconds=HOUR).items] == ["flow/joined"]


def test_gc_keeps_what_a_young_artifact_was_made_from(store: ArtifactStore) -> None:
    age(store, "artifacts", fingerprint_of(store, "data", OLD), seconds=2 * HOUR)
    assert found(store, keep_runs=0, min_age_seconds=HOUR).items == ()
    assert statuses(store, "malt") == {"hit"}


def test_gc_keeps_what_an_artifact_under_a_live_lease_was_made_from(store: ArtifactStore) -> None:
    store.lease(fingerprint_of(store, "joined", OLD)).acquire(Holder.of_this_process("other"))
    assert collected(store) == []


def test_gc_twice_at_once_deletes_what_either_found(store: ArtifactStore) -> None:
    one, two = found(store), found(store, keep_runs=0)
    delete(store, one)
    delete(store, two)
    assert store.fingerprints() == []


def test_gc_that_gives_way_to_a_run_restores_what_no_other_gc_deleted(store: ArtifactStore) -> None:
    garbage = found(store)
    lost = next(item for item in garbage.items if item.text == "flow/joined")
    lost.folder.delete([entry.name for entry in lost.entries])
    announce(store, STARTING)
    with pytest.raises(StoreBusy, match=STARTING):
        delete(store, garbage)
    assert statuses(store, "malt") == {"hit", "committed"}


@pytest.mark.parametrize("torn", [b"", b'{"data": "ab', b"\0" * 40])
def test_gc_is_refused_where_what_a_kept_run_reads_is_torn(store: ArtifactStore, torn: bytes) -> None:
    (store.root / "runs" / NEW).put("steps.json", torn)
    with pytest.raises(StoreBusy, match=rf"{NEW}/steps.json is torn.*nothing is collected; delete that object"):
        found(store)
    assert len(found(store, keep_runs=0).items) == 4


def test_gc_keeps_what_a_live_run_holds_the_lease_of(store: ArtifactStore) -> None:
    data = store.resolve(fingerprint_of(store, "data", OLD))
    store.lease(data).acquire(Holder.of_this_process("other"))
    assert collected(store) == ["flow/joined"]


def test_gc_collects_the_output_of_attempts_that_no_commit_names(store: ArtifactStore) -> None:
    fingerprint = fingerprint_of(store, "data", NEW)
    store.folder(fingerprint).put("out/000000/text.txt", b"of an attempt that failed")
    (item,) = [item for item in found(store).items if item.kind == "attempt"]
    assert (item.name, item.size_bytes) == (fingerprint, 25)
    collected(store)
    assert statuses(store, "rye") == {"hit"}
    assert not store.folder(fingerprint).has("out/000000/text.txt")


def test_gc_keeps_what_an_attempt_to_come_goes_on_from(store: ArtifactStore) -> None:
    fingerprint = fingerprint_of(store, "data", NEW)
    store.folder(fingerprint).put("resume/000001/abc/000001.json", b"snapshot of what is committed")
    assert {item.kind for item in found(store).items} == {"artifact", "snapshot"}
    store.folder(fingerprint).put("resume/000002/abc/000001.json", b"receipt of a shard")
    store.folder(fingerprint).put("out/000000/part.txt", b"the shard")
    delete(store, found(store))
    assert store.folder(fingerprint).has("resume/000002/abc/000001.json")
    assert store.folder(fingerprint).has("out/000000/part.txt")
    assert not store.folder(fingerprint).has("resume/000001/abc/000001.json")


def test_gc_collects_old_runs_that_are_published_and_whose_artifacts_are_gone(store: ArtifactStore) -> None:
    assert collected(store) == ["flow/data", "flow/joined"]
    assert collected(store) == [], "its events are not in MLflow yet"
    for run in (OLD, NEW):
        mark_published(store.root / "runs", run)
    assert [item.name for item in found(store, keep_runs=0).items if item.kind == "run"] == [OLD, NEW]
    assert [item.name for item in found(store).items] == [OLD]
    announce(store, OLD)
    assert found(store).items == ()


def test_gc_keeps_the_record_of_the_run_that_made_what_is_kept(store: ArtifactStore) -> None:
    store.pin(store.resolve(fingerprint_of(store, "joined", OLD)), "shipped")
    mark_published(store.root / "runs", OLD)
    assert found(store).items == ()


def test_gc_keeps_what_any_registry_names_that_the_store_was_used_with(store: ArtifactStore, tmp_path: Path) -> None:
    other = f"sqlite:///{tmp_path / 'other.db'}"
    register(other, fingerprint_of(store, "joined", OLD))
    assert len(found(store).items) == 2
    remember_tracking_uri(store.root, other)
    assert found(store).items == ()


def test_gc_is_refused_where_one_of_the_registries_cannot_be_asked(store: ArtifactStore) -> None:
    remember_tracking_uri(store.root, "http://user:hunter2hunter2@127.0.0.1:1")
    with pytest.raises(TrackingUnavailable, match=r"127\.0\.0\.1:1.*nothing is collected.*mlflow/known") as caught:
        found(store)
    assert "hunter2" not in str(caught.value)


def age(store: ArtifactStore, *parts: str, seconds: float) -> None:
    """Let everything below a folder of the store have been written so long ago."""
    then = time.time() - seconds
    for path in Path(store.uri, *parts).rglob("*"):
        os.utime(path, (then, then))


def register(uri: str, fingerprint: str) -> None:
    """Let a registry name an artifact."""
    client = connect(uri, "").client
    client.create_registered_model("student")
    client.create_model_version("student", "file:///nowhere", tags={"fingerprint": fingerprint})
