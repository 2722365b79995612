"""The digest cache: what is read once, read again, and kept under writers that race."""

import json
import os
import threading
from pathlib import Path

import pytest

from stages.external import digests
from stages.external.digests import digest_files
from tests.stages.written import write


def settle(path: Path) -> None:
    """Make a file look old enough to be cached."""
    os.utime(path, ns=(10**18, 10**18))


def test_digests_of_a_settled_file_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, a__txt="one") / "a.txt"
    settle(path)
    first = digest_files({"a": path})
    monkeypatch.setattr(digests, "sha256_of", lambda path, watch: pytest.fail("read again"))
    assert digest_files({"a": path}) == first


def test_digests_after_an_edit_of_equal_size_differ(tmp_path: Path) -> None:
    path = write(tmp_path, a__txt="one") / "a.txt"
    first = digest_files({"a": path})[0].sha256
    path.write_text("two")
    assert digest_files({"a": path})[0].sha256 != first


def test_digests_of_a_fresh_file_are_not_cached(tmp_path: Path, cache: Path) -> None:
    digest_files({"a": write(tmp_path, a__txt="one") / "a.txt"})
    assert not (cache / "digests.jsonl").exists()


def test_digests_cache_with_a_torn_line_still_serves(tmp_path: Path, cache: Path) -> None:
    path = write(tmp_path, a__txt="one") / "a.txt"
    settle(path)
    write(cache, digests__jsonl='["[\\"torn')
    first = digest_files({"a": path})
    (key, digest) = json.loads((cache / "digests.jsonl").read_text().splitlines()[-1])
    assert digest == first[0].sha256
    assert str(path) in key


def test_digests_cache_with_concurrent_writers_keeps_every_line(tmp_path: Path, cache: Path) -> None:
    paths = [write(tmp_path, **{f"f{i}__txt": str(i)}) / f"f{i}.txt" for i in range(40)]
    for path in paths:
        settle(path)
    threads = [threading.Thread(target=digest_files, args=({"a": path},)) for path in paths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = [json.loads(line) for line in (cache / "digests.jsonl").read_text().splitlines() if line]
    assert {json.loads(key)[0] for key, _ in lines} == {str(path) for path in paths}


def test_digests_with_an_unwritable_cache_are_still_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, a__txt="one", blocked="") / "a.txt"
    settle(path)
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "blocked" / "cache"))
    assert len(digest_files({"a": path})[0].sha256) == 64
