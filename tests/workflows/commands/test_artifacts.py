"""`stillhouse artifacts`: what `verify` shows, withdraws and remembers."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import pytest

from tests.fakes import InlineTasks, drive
from tests.stages_for_tests import Write
from workflows.cli import run_command
from workflows.commands import artifacts
from workflows.engine.graph import Workflow
from workflows.engine.store import ArtifactStore, Commit

LONG_AGO = 1_700_000_000


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ArtifactStore:
    """A store with one artifact, whose files are too old to be racily clean."""
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    flow, made = Workflow("flow"), ArtifactStore(str(tmp_path / "store"))
    flow.step("data", Write(text="malt"))
    drive(flow, made, InlineTasks())
    for path in output(made):
        os.utime(path, (LONG_AGO, LONG_AGO))
    return made


def output(store: ArtifactStore) -> list[Path]:
    return [path for path in Path(store.uri).glob("artifacts/*/out/*/*") if path.is_file()]


def newest(store: ArtifactStore) -> Commit:
    commit = store.newest(store.fingerprints()[0])
    assert commit is not None
    return commit


def fail_if_hashed(path: str, num_bytes: int) -> NoReturn:
    pytest.fail(f"{path} is hashed again")


def test_verify_shows_each_file_and_runs_need_not_hash_it_again(
    store: ArtifactStore, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workflows.commands.terminal.LINE_SECONDS", -1.0)
    assert run_command(["artifacts", "verify", "--store", store.uri]) == 0
    shown = capsys.readouterr().out
    assert "verifying data: text.txt (0 MB read)" in shown
    assert "1 artifacts verify, 0 do not" in shown
    assert store.problems(newest(store), watch=fail_if_hashed) == []


def test_verify_hashes_files_that_look_unchanged_and_withdraws_what_is_rotten(
    store: ArtifactStore, capsys: pytest.CaptureFixture[str]
) -> None:
    verify = ("artifacts", "verify", "--store", store.uri, "--json")
    assert run_command(verify) == 0
    (path,) = (path for path in output(store) if path.name == "text.txt")
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.write(b"M")
    os.utime(path, (LONG_AGO, LONG_AGO))
    capsys.readouterr()
    assert run_command(verify) == 1
    (row,) = json.loads(capsys.readouterr().out)["artifacts"]
    assert row["problems"] == ["text.txt has another sha256 than its manifest names"]
    assert store.newest(row["fingerprint"]) is None


def test_verify_interrupted_says_so_in_its_exit_code_and_its_answer(
    store: ArtifactStore, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def interrupted(*_: object) -> Iterator[object]:
        def show(line: str) -> NoReturn:
            raise KeyboardInterrupt

        yield show

    monkeypatch.setattr(artifacts, "progress_line", interrupted)
    assert run_command(["artifacts", "verify", "--store", store.uri, "--json"]) == 130
    assert json.loads(capsys.readouterr().out)["error"]["kind"] == "Interrupted"
    assert newest(store).manifest.step == "data"
