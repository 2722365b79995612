"""Claims, commits and withdrawals: on local disk and on a real S3 endpoint, races between two writers included."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import obstore
import pytest

from stages.contract import Shards
from stages.errors import ConfigError, StageFailed, StillhouseError
from stages.storage import File, Folder, fetch
from tests.fakes import fake_manifest
from workflows.engine.heartbeat import Holder, Liveness, beating
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


def unwatched(path: str, num_bytes: int) -> None:
    """Let files be hashed without being shown."""


def manifest(store: ArtifactStore, claim: Claim, **inputs: InputCommit) -> Manifest:
    files = seal(store.out(claim), store.resume(claim))
    return fake_manifest(claim, files=files, inputs=inputs)


def test_commit_written_files_are_read_back(store: ArtifactStore) -> None:
    claim = claimed(store)
    store.out(claim).put("a/b.txt", b"spirit")
    commit = store.commit(claim, manifest(store, claim))
    assert store.newest(F) == commit
    assert store.problems(commit, unwatched, anew=True) == []
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
    with beating(runs, "far"):
        pass
    assert liveness.alive(holder)
    now[0] += 59
    assert liveness.alive(holder)
    now[0] += 2
    assert not liveness.alive(holder)
    with beating(runs, "far"):
        pass
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
        store.commit(late, manifest(store, late).model_copy(update={"run": "another"}))


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

    def race(run: str) -> None:
        start.wait()
        try:
            outcomes.append(store.commit(claim, content.model_copy(update={"run": run})))
        except Fenced as error:
            outcomes.append(error)

    threads = [threading.Thread(target=race, args=(f"run-{number}",)) for number in range(4)]
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
    assert found in store.problems(commit, unwatched if deep else None, anew=deep)[0]


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
    files = seal(store.out(second), store.resume(second))
    assert [file.path for file in files] == ["out/000002/s/0.txt"]
    assert store.out(first).entries() == []


def test_seal_lost_shard_is_an_error(store: ArtifactStore) -> None:
    claim = claimed(store)
    Shards(store.out(claim), store.resume(claim)).write("s/0.txt", b"zero", {})
    store.out(claim).delete(["s/0.txt"])
    with pytest.raises(StillhouseError, match="missing or cut short"):
        seal(store.out(claim), store.resume(claim))


def test_commit_whose_answer_was_lost_stands(store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The put wrote and its answer was lost: a second look finds it, as does one after another run's claim."""
    claim, put = claimed(store), Folder.put
    content = manifest(store, claim)

    def lossy(self: Folder, name: str, *values: Any, **options: Any) -> File:
        put(self, name, *values, **options)
        raise OSError("connection reset")

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "put", lossy)
        with pytest.raises(OSError, match="connection reset"):
            store.commit(claim, content)
    commit = store.commit(claim, content)
    assert (commit.generation, commit.manifest) == (1, content)
    claimed(store)
    assert store.commit(claim, content) == commit
    with pytest.raises(Fenced, match="overtaken"):
        store.commit(claim, content.model_copy(update={"run": "another"}))


def test_seal_under_another_spelling_of_the_store_commits_what_verifies(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "store")
    one, other = ArtifactStore(str(tmp_path / "store")), ArtifactStore(str(tmp_path / "link"))
    claim = claimed(one)
    Shards(one.out(claim), one.resume(claim)).write("s/0.txt", b"zero", {})
    claim = claimed(other)
    Shards(other.out(claim), other.resume(claim)).write("s/1.txt", b"one", {})
    commit = other.commit(claim, manifest(other, claim))
    assert [file.path for file in commit.manifest.files] == ["out/000001/s/0.txt", "out/000002/s/1.txt"]
    for store in (one, other):
        found = store.newest(F)
        assert found is not None
        assert store.problems(found, unwatched, anew=True) == []


def test_seal_lists_the_folder_once_and_reads_nothing_back(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ArtifactStore(f"{s3}/{tmp_path.name}")
    claim = claimed(store)
    shards = Shards(store.out(claim), store.resume(claim))
    for index in range(5):
        shards.write(f"s/{index}.txt", b"shard", {})
    store.out(claim).put("dataset.json", b"{}")
    (tmp_path / "weights").write_bytes(os.urandom(9_000_000))
    uploaded = store.out(claim).upload(tmp_path / "weights", "model/weights")
    listed: list[str] = []
    entries = Folder.entries
    monkeypatch.setattr(Folder, "entries", lambda self, prefix="": listed.append(self.uri) or entries(self, prefix))
    monkeypatch.setattr(Folder, "stream", lambda self, name: pytest.fail(f"{name} is read back"))
    files = seal(store.out(claim), store.resume(claim))
    assert len(files) == 7
    assert {file.name: file.sha256 for file in files}["model/weights"] == uploaded.sha256
    assert [uri.rsplit("/", 1)[1] for uri in listed] == ["out", "receipts"]


def test_seal_object_that_notes_no_digest_is_hashed(s3: str, tmp_path: Path) -> None:
    """Written past `Folder`, as by another program."""
    store = ArtifactStore(f"{s3}/{tmp_path.name}")
    claim = claimed(store)
    inner, key = store.out(claim)._key("x.txt")
    obstore.put(inner, key, b"spirit")
    (file,) = seal(store.out(claim), store.resume(claim))
    assert file.sha256 == hashlib.sha256(b"spirit").hexdigest()


def test_upload_of_a_file_that_changes_meanwhile_is_an_error(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").write_bytes(b"after")
    monkeypatch.setattr("stages.storage.sha256_of", lambda path: hashlib.sha256(b"before").hexdigest())
    with pytest.raises(OSError, match="changed while it was uploaded"):
        Folder.at(s3).upload(tmp_path / "x", f"{tmp_path.name}/x")


@pytest.mark.parametrize("torn", [b"", b'{"schema": 2, "fingerp', b"\0" * 60], ids=["empty", "half", "zeros"])
@pytest.mark.parametrize("kind", ["commit", "claim", "pointer", "withdrawal", "receipt"])
def test_object_that_a_power_cut_tore_counts_as_absent(
    store: ArtifactStore, kind: str, torn: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    claim = claimed(store)
    shards = Shards(store.out(claim), store.resume(claim))
    shards.write("s/0.txt", b"zero", {"rows": 1})
    commit = store.commit(claim, manifest(store, claim))
    store.point("flow", "step", commit)
    folder, pointers = store.folder(F), store.root / "by-name" / "flow"
    match kind:
        case "commit":
            folder.put("commits/000001.json", torn)
            assert store.newest(F) is None
            assert reachable(store, [F]) == {F}
            assert store.read(F, 1) is None
            again = claimed(store)
            assert store.commit(again, manifest(store, again)).generation == 2
        case "claim":
            folder.put("claims/000001.json", torn)
            assert isinstance(store.claim(F, "another"), Claim)
        case "pointer":
            pointers.put("step.json", torn)
            assert store.pointed("flow", "step") is None
        case "withdrawal":
            folder.put("withdrawn/000001.json", torn)
            assert store.newest(F) is None
            assert store.withdrawal(F) == "for a reason that a power cut took"
        case "receipt":
            shards.resume.put("receipts/s~0.txt.json", torn)
            assert shards.done() == {}
            shards.write("s/0.txt", b"zero", {"rows": 1})
            assert shards.done() == {"s/0.txt": {"rows": 1}}
    assert "torn" in caplog.text


def test_store_of_an_older_version_is_a_clear_error(store: ArtifactStore) -> None:
    (store.folder(F) / "commits").put_json("000001.json", {"schema": 1, "fingerprint": F, "step": "data"})
    (store.root / "by-name" / "flow").put_json("data.json", {"fingerprint": F, "generation": 1})
    assert store.resolve("flow/data") == F
    for look in (lambda: store.newest(F), lambda: store.read(F, 1), lambda: reachable(store, [F])):
        with pytest.raises(
            ConfigError, match=r"another version of stillhouse \(it has schema 1, expected 2\); use anoth"
        ):
            look()
    (store.root / "by-name" / "flow").put_json("data.json", {"step": "of another layout"})
    assert store.pointed("flow", "data") is None


def test_problems_with_a_watch_hash_once_and_can_be_stopped(
    store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("stages.external.digests.SETTLED_SECONDS", -1.0)
    claim = claimed(store)
    for name in ("a.txt", "b.txt"):
        store.out(claim).put(name, b"spirit")
    commit = store.commit(claim, manifest(store, claim))
    seen: list[tuple[str, int]] = []

    def watch(name: str, num_bytes: int) -> None:
        seen.append((name.rsplit("/", 1)[1], num_bytes))
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.problems(commit, watch)
    for _ in range(3):
        assert store.problems(commit, watch) == []
    assert seen == [("a.txt", 6), ("b.txt", 6), ("b.txt", 6)], "each once, and the one that was stopped again"
    store.out(claim).put("a.txt", b"Spirit")
    assert "another sha256" in store.problems(commit, unwatched, anew=True)[0]


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
