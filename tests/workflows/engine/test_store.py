"""Claims, commits and withdrawals: on local disk and on a real S3 endpoint, races between two writers included."""

import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stages.contract import Shards
from stages.errors import ConfigError, StageFailed, StillhouseError
from stages.storage import File, Folder, fetch
from tests.fakes import fake_manifest
from workflows.engine.heartbeat import Heartbeat, Holder, Liveness
from workflows.engine.identity import Fingerprint
from workflows.engine.manifest import InputCommit, Manifest
from workflows.engine.store import ArtifactStore, Claim, Commit, Fenced, reachable, seal

F = Fingerprint("f" * 64)


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ArtifactStore:
    if request.param == "local":
        return ArtifactStore(str(tmp_path / "store"))
    return ArtifactStore(f"{request.getfixturevalue('s3')}/{tmp_path.name}")


def claimed(store: ArtifactStore, run: str = "run", fingerprint: Fingerprint = F) -> Claim:
    claim = store.claim(fingerprint, run)
    assert isinstance(claim, Claim)
    return claim


def manifest(store: ArtifactStore, claim: Claim, **inputs: InputCommit) -> Manifest:
    files = seal(store.out(claim), store.resume(claim), store.folder(claim.fingerprint))
    return fake_manifest(claim, files=files, inputs=inputs)


def test_commit_written_files_are_read_back(store: ArtifactStore) -> None:
    claim = claimed(store)
    store.out(claim).put("a/b.txt", b"spirit")
    commit = store.commit(claim, manifest(store, claim))
    assert store.newest(F) == commit
    assert store.problems(commit, deep=True) == []
    (path,) = commit.artifact.paths("a/*")
    assert path.read_bytes() == b"spirit"


def test_newest_before_any_commit_is_none_though_files_are_there(store: ArtifactStore) -> None:
    store.out(claimed(store)).put("half.txt", b"half")
    assert store.newest(F) is None


def test_claim_of_a_live_run_makes_others_wait(store: ArtifactStore) -> None:
    claimed(store, "first")
    other = store.claim(F, "second")
    assert isinstance(other, Holder)
    assert other.run == "first"


def test_claim_of_a_dead_process_is_taken_over_at_once(store: ArtifactStore) -> None:
    code = f"from workflows.engine.store import *; print(ArtifactStore({store.uri!r}).claim(Fingerprint({F!r}), 'dead').epoch)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "1"
    assert claimed(store, "alive").epoch == 2


def test_claim_of_another_host_lives_as_long_as_its_heartbeat_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = Folder.at(tmp_path / "runs")
    holder = replace(Holder.of_this_process("far"), host="another-host")
    liveness, now = Liveness(runs), [100.0]
    monkeypatch.setattr("workflows.engine.heartbeat.time.monotonic", lambda: now[0])
    assert not liveness.alive(holder), "no heartbeat was ever written"
    Heartbeat(runs, "far").stop()
    assert liveness.alive(holder)
    now[0] += 59
    assert liveness.alive(holder)
    now[0] += 2
    assert not liveness.alive(holder)
    Heartbeat(runs, "far").stop()
    assert liveness.alive(holder), "it moved again"


def test_commit_of_an_overtaken_writer_is_refused(store: ArtifactStore) -> None:
    slow, fast = claimed(store, "run"), claimed(store, "run")
    store.out(slow).put("x.txt", b"slow")
    with pytest.raises(Fenced, match="overtaken by epoch 2"):
        store.commit(slow, manifest(store, slow))
    store.out(fast).put("x.txt", b"fast")
    commit = store.commit(fast, manifest(store, fast))
    assert commit.artifact.files[0].sha256 == store.out(fast).digest("x.txt").sha256


def test_commit_same_generation_twice_is_refused_even_past_the_epoch_check(store: ArtifactStore) -> None:
    first = claimed(store)
    store.commit(first, manifest(store, first))
    late = Claim(F, first.epoch, first.generation)
    with pytest.raises(Fenced, match="committed already"):
        store.commit(late, manifest(store, late))


def test_claims_of_many_racing_threads_get_different_epochs(store: ArtifactStore) -> None:
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(claimed(store, "run").epoch)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == list(range(1, 9))


def test_commits_of_racing_writers_leave_exactly_one(store: ArtifactStore) -> None:
    """Both pass the epoch check at the same moment, as two hosts might: the create-only name decides."""
    claim = claimed(store)
    store.out(claim).put("x.txt", b"x")
    content, outcomes = manifest(store, claim), []
    start = threading.Barrier(4)

    def race() -> None:
        start.wait()
        try:
            outcomes.append(store.commit(claim, content))
        except Fenced as error:
            outcomes.append(error)

    threads = [threading.Thread(target=race) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(isinstance(outcome, Commit) for outcome in outcomes) == 1
    assert store.generations(F) == [1]


def test_withdrawn_commit_counts_no_longer_and_the_next_is_a_new_generation(store: ArtifactStore) -> None:
    claim = claimed(store)
    store.out(claim).put("x.txt", b"rotten")
    store.withdraw(store.commit(claim, manifest(store, claim)), "x.txt is rotten")
    assert store.newest(F) is None
    assert store.withdrawal(F) == "x.txt is rotten"
    again = claimed(store)
    assert (again.epoch, again.generation) == (2, 2)
    assert store.resume(again).uri != store.resume(claim).uri


@pytest.mark.parametrize(
    ("harm", "deep", "found"),
    [
        (lambda folder: folder.delete(["x.txt"]), False, "x.txt is missing"),
        (lambda folder: folder.put("x.txt", b"short"), False, "has 5 bytes, expected 6"),
        (lambda folder: folder.put("x.txt", b"Spirit"), True, "another sha256"),
    ],
    ids=["missing", "cut", "changed"],
)
def test_problems_of_a_harmed_file_are_found(store: ArtifactStore, harm: Any, deep: bool, found: str) -> None:
    claim = claimed(store)
    store.out(claim).put("x.txt", b"spirit")
    commit = store.commit(claim, manifest(store, claim))
    harm(store.out(claim))
    assert found in store.problems(commit, deep=deep)[0]


def test_seal_takes_shards_of_earlier_epochs_by_their_receipts(store: ArtifactStore) -> None:
    first = claimed(store)
    Shards(store.out(first), store.resume(first)).write("s/0.txt", b"zero", {"rows": 1})
    store.out(first).put("s/1.txt", b"half writ")  # no receipt: the attempt died here
    second = claimed(store)
    shards = Shards(store.out(second), store.resume(second))
    assert shards.done() == {"s/0.txt": {"rows": 1}}
    shards.write("s/1.txt", b"one", {"rows": 1})
    commit = store.commit(second, manifest(store, second))
    assert [(file.name, "/".join(file.uri.split("/")[-4:-2])) for file in commit.artifact.files] == [
        ("s/0.txt", "out/000001"),
        ("s/1.txt", "out/000002"),
    ]
    assert [path.read_bytes() for path in commit.artifact.paths("s/*")] == [b"zero", b"one"]


def test_shards_same_shard_from_two_attempts_is_kept_once(store: ArtifactStore) -> None:
    """A zombie of a killed run finishes a shard after its successor did."""
    first, second = claimed(store), claimed(store)
    Shards(store.out(second), store.resume(second)).write("s/0.txt", b"zero", {})
    Shards(store.out(first), store.resume(second)).write("s/0.txt", b"zero", {})
    files = seal(store.out(second), store.resume(second), store.folder(F))
    assert [file.path for file in files] == ["out/000002/s/0.txt"]
    assert store.out(first).entries() == []


def test_seal_lost_shard_is_an_error(store: ArtifactStore) -> None:
    claim = claimed(store)
    Shards(store.out(claim), store.resume(claim)).write("s/0.txt", b"zero", {})
    store.out(claim).delete(["s/0.txt"])
    with pytest.raises(StillhouseError, match="missing or cut short"):
        seal(store.out(claim), store.resume(claim), store.folder(F))


def test_point_names_a_commit_and_links_it_for_people(tmp_path: Path) -> None:
    store = ArtifactStore(str(tmp_path))
    claim = claimed(store)
    store.out(claim).put("x.txt", b"x")
    store.point("flow", "step.a", store.commit(claim, manifest(store, claim)))
    assert store.resolve("flow/step.a") == F
    assert (tmp_path / "by-name" / "flow" / "step.a" / "x.txt").read_bytes() == b"x"


def test_resolve_unknown_or_ambiguous_is_an_error(store: ArtifactStore) -> None:
    for digit in "01":
        claim = claimed(store, fingerprint=Fingerprint("a" * 63 + digit))
        store.commit(claim, manifest(store, claim))
    with pytest.raises(ConfigError, match="2 artifacts"):
        store.resolve("aaa")
    with pytest.raises(ConfigError, match="no artifact"):
        store.resolve("bbb")
    with pytest.raises(ConfigError, match="no artifact by the name"):
        store.resolve("flow/step")


def test_reachable_follows_inputs(store: ArtifactStore) -> None:
    made_from = claimed(store, fingerprint=Fingerprint("1" * 64))
    store.commit(made_from, manifest(store, made_from))
    claim = claimed(store)
    store.commit(claim, manifest(store, claim, data=InputCommit(fingerprint="1" * 64, generation=1)))
    assert reachable(store, [F]) == {F, "1" * 64}


def test_check_writable_of_a_read_only_store_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ConfigError, match="cannot be written"):
        ArtifactStore(str(tmp_path / "file")).check_writable()


def test_fetch_from_s3_is_checked_by_its_digest(s3: str, tmp_path: Path) -> None:
    file = Folder.at(s3).put(f"{tmp_path.name}/x.txt", b"spirit")
    assert fetch(file, tmp_path).read_bytes() == b"spirit"
    wrong = File("y.txt", file.uri, file.size_bytes, "0" * 64)
    with pytest.raises(StageFailed, match="expected 000000000000"):
        fetch(wrong, tmp_path)
    assert not (tmp_path / "y.txt").exists()


def test_upload_streams_a_large_file(store: ArtifactStore, tmp_path: Path) -> None:
    path = tmp_path / "large.bin"
    path.write_bytes(os.urandom(20_000_000))
    file = store.root.upload(path, "large.bin")
    assert store.root.digest("large.bin") == file
    assert file.size_bytes == 20_000_000


def test_put_json_refuses_what_json_cannot_hold(store: ArtifactStore) -> None:
    with pytest.raises(ValueError, match=r"not JSON compliant|Out of range"):
        store.root.put_json("x.json", {"x": float("nan")})
    store.root.put_json("x.json", {"b": 1, "a": 2})
    assert json.loads(store.root.get("x.json")) == {"a": 2, "b": 1}
