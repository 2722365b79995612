"""Garbage collection for real: what it deletes, and what it must not."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.fakes import InlineTasks, drive
from tests.stages_for_tests import Join, Write
from workflows.engine.gc import delete, find_garbage
from workflows.engine.graph import Workflow
from workflows.engine.heartbeat import Holder
from workflows.engine.run import Settings
from workflows.engine.store import ArtifactStore
from workflows.engine.tracking.connection import connect

OLD, NEW = "20260101-000000-aaaaaa", "20260102-000000-bbbbbb"


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
    connect(Settings(store=made.uri).tracking(made), made.uri)
    return made


def collected(
    store: ArtifactStore, *, keep_runs: int = 1, yes: bool = False, min_age_seconds: float = 0.0
) -> list[str]:
    garbage = find_garbage(store, tracking_uri=None, keep_runs=keep_runs, min_age_seconds=min_age_seconds)
    if yes:
        delete(store, garbage)
    return sorted(item.text for item in garbage.items)


def statuses(store: ArtifactStore, text: str) -> set[str]:
    return {step.outcome for step in drive(graph(text), store, InlineTasks(), run="later")[0].steps.values()}


def test_gc_deletes_what_no_kept_run_reaches_and_nothing_else(store: ArtifactStore) -> None:
    assert collected(store) == ["flow/data", "flow/joined"]
    assert len(store.fingerprints()) == 4, "a dry run deletes nothing"
    assert collected(store, yes=True) == ["flow/data", "flow/joined"]
    assert collected(store) == []
    assert len(store.fingerprints()) == 2
    assert statuses(store, "rye") == {"hit"}
    assert statuses(store, "malt") == {"committed"}


def test_gc_keeps_what_a_pinned_artifact_is_made_of(store: ArtifactStore) -> None:
    (joined,) = [f for f in map(store.resolve, store.fingerprints()) if _step(store, f) == ("joined", OLD)]
    store.pin(joined, "shipped")
    assert collected(store, keep_runs=1, yes=True) == []
    assert statuses(store, "malt") == {"hit"}


def test_gc_keeps_what_a_living_run_uses_however_old(store: ArtifactStore) -> None:
    (store.root / "runs" / OLD).put_json("heartbeat.json", Holder.of_this_process(OLD).to_json())
    assert collected(store, keep_runs=0, yes=True) == ["flow/data", "flow/joined"]
    assert statuses(store, "malt") == {"hit"}


def _step(store: ArtifactStore, fingerprint: str) -> tuple[str, str]:
    commit = store.newest(store.resolve(fingerprint))
    assert commit is not None
    return commit.manifest.step, commit.manifest.run
