"""Snapshots: complete or not there, damaged ones passed over, two kept, less often where they cost much."""

from pathlib import Path

import pytest
import torch

from stages.storage import Folder
from stages.train import snapshots


def _write(folder: Folder, step: int) -> None:
    snapshots.write(folder, step, {"weights/a": torch.full((3,), float(step))}, {"tokens": step})


def test_newest_without_snapshots_is_none(tmp_path: Path) -> None:
    assert snapshots.newest(Folder.at(tmp_path)) is None


def test_write_many_keeps_the_two_newest(tmp_path: Path) -> None:
    folder = Folder.at(tmp_path)
    for step in (5, 10, 15, 20):
        _write(folder, step)
    names = [entry.name for entry in (folder / "snapshots").entries()]
    assert [name[:10] for name in names] == ["0000000015"] * 2 + ["0000000020"] * 2
    found = snapshots.newest(folder)
    assert found is not None
    assert (found.step, found.facts) == (20, {"tokens": 20})
    assert torch.equal(snapshots.read(folder, found)["weights/a"], torch.full((3,), 20.0))


def test_newest_without_a_marker_is_not_read(tmp_path: Path) -> None:
    folder = Folder.at(tmp_path)
    _write(folder, 5)
    (folder / "snapshots").put("0000000009-abcd.safetensors", b"half of")
    found = snapshots.newest(folder)
    assert found is not None
    assert found.step == 5


@pytest.mark.parametrize("torn", [b"", b'{"name": "00', b"\0" * 40, b"[]", b'{"name": "a"}'])
def test_newest_with_a_torn_marker_is_passed_over_and_counts_as_none_of_the_kept(tmp_path: Path, torn: bytes) -> None:
    folder = Folder.at(tmp_path)
    _write(folder, 5)
    for name in ("0000000008-aa", "0000000009-bb"):
        (folder / "snapshots").put(f"{name}.json", torn)
    found = snapshots.newest(folder)
    assert found is not None
    assert found.step == 5
    _write(folder, 6)
    found = snapshots.newest(folder)
    assert found is not None
    assert found.step == 6


def test_newest_with_damaged_or_missing_bytes_is_passed_over(tmp_path: Path) -> None:
    folder = Folder.at(tmp_path)
    _write(folder, 5)
    _write(folder, 6)
    newest = snapshots.newest(folder)
    assert newest is not None
    (folder / "snapshots").put(f"{newest.name}.safetensors", b"damaged")
    before = snapshots.newest(folder)
    assert before is not None
    assert before.step == 5
    (folder / "snapshots").delete([f"{before.name}.safetensors"])
    assert snapshots.newest(folder) is None


def test_keeper_of_slow_snapshots_waits_longer(tmp_path: Path) -> None:
    now = iter([0.0, 0.0, 29.0, 31.0, 31.0, 41.0, 200.0, 242.0])
    snapshot_writer = snapshots.SnapshotWriter(Folder.at(tmp_path), clock=lambda: next(now))
    assert [snapshot_writer.due(), snapshot_writer.due(), snapshot_writer.due()] == [False, False, True]
    snapshot_writer.keep(1, {"weights/a": torch.zeros(1)}, {})  # takes 10 s: the next is due after 200 s
    assert [snapshot_writer.due(), snapshot_writer.due()] == [False, True]
