"""Parts and pieces: nothing is lost or read twice, wherever a file is divided."""

import codecs
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.errors import StageFailed, Transient
from stages.external.documents import Files, HubDataset, LocalDataset, PythonDocs
from stages.prepare.opening import open_dataset
from stages.prepare.parts import plan_parts
from stages.prepare.python_docs import extract_docstrings, list_modules, read_module, read_topics
from stages.prepare.reading import cut_text, first_row_number, read_piece


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))


def rows(source: Any, part_bytes: int) -> list[tuple[str, int, Any]]:
    """Read every part: (file, row number in the file, value or problem)."""
    return [
        (piece.name, first_row_number(piece) + row.number, row.problem or row.value)
        for part in plan_parts(source, part_bytes)
        for piece in part.pieces
        for row in read_piece(piece)
    ]


@pytest.mark.parametrize("part_bytes", [1024, 3000, 10**6])
def test_lines_are_read_once_wherever_the_file_is_cut(tmp_path: Path, part_bytes: int) -> None:
    lines = [json.dumps({"n": i, "x": "é" * (i % 97)}, ensure_ascii=False) for i in range(200)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    found = rows(Files(paths=(str(tmp_path),)), part_bytes)
    assert [(number, value["n"]) for _, number, value in found] == [(i + 1, i) for i in range(200)]


@pytest.mark.parametrize("part_bytes", [1024, 10**6])
def test_parquet_rows_are_read_once_wherever_the_file_is_cut(tmp_path: Path, part_bytes: int) -> None:
    table = pa.table({"text": [f"row {i} {i * 7919 % 104729}" for i in range(1000)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=130)
    parts = plan_parts(Files(paths=(str(tmp_path),)), part_bytes)
    assert (len(parts) > 1) == (part_bytes == 1024)
    found = rows(Files(paths=(str(tmp_path),)), part_bytes)
    assert [(number, value["text"].split()[1]) for _, number, value in found] == [(i + 1, str(i)) for i in range(1000)]


@pytest.mark.parametrize("part_bytes", [1024, 10**6])
def test_dataset_rows_are_read_once(tmp_path: Path, part_bytes: int) -> None:
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"text": [f"row {i}" for i in range(500)]}).save_to_disk(tmp_path / "d")
    found = rows(LocalDataset(path=str(tmp_path / "d")), part_bytes)
    assert [(number, value["text"]) for _, number, value in found] == [(i + 1, f"row {i}") for i in range(500)]


def test_json_list_is_read_whole_and_strangers_in_it_are_problems(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"text": "x" * 3000}, 3]))
    found = rows(Files(paths=(str(tmp_path),)), 1024)
    assert [number for _, number, _ in found] == [1, 2]
    assert found[1][2] == "a JSON int, expected an object with fields"
    (tmp_path / "a.json").write_bytes(codecs.BOM_UTF8 + b'[{"text": "a"}]')
    assert [value["text"] for _, _, value in rows(Files(paths=(str(tmp_path),)), 1024)] == ["a"]
    (tmp_path / "a.json").write_text("[1,")
    assert rows(Files(paths=(str(tmp_path),)), 1024)[0][2].startswith("not JSON")


def test_line_nested_too_deeply_is_a_problem_and_the_next_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("[" * 100_000 + '\n{"text": "a"}\n')
    found = rows(Files(paths=(str(tmp_path),)), 10**6)
    assert found[0][2].startswith("not JSON")
    assert found[1][2] == {"text": "a"}


def test_text_with_windows_line_ends_is_cut_as_its_copy_with_others(tmp_path: Path) -> None:
    text = "".join(f"paragraph {i} {'word ' * 400}\n\n" for i in range(30))
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "b.txt").write_bytes(text.replace("\n", "\r\n").encode())
    found = [[v for _, _, v in rows(Files(paths=(str(tmp_path / n),)), 10**6)] for n in ("a.txt", "b.txt")]
    assert len(found[0]) > 1
    assert found[0] == found[1]


def test_text_that_is_not_utf8_is_a_problem_at_its_byte(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"abc\xff")
    assert rows(Files(paths=(str(tmp_path),)), 1024) == [("a.txt", 1, "not UTF-8 at byte 3")]


def test_small_files_share_a_part_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("c", "a", "b"):
        (tmp_path / f"{name}.txt").write_text(name * 600)
    parts = plan_parts(Files(paths=(str(tmp_path),)), 1500)
    assert [[piece.name for piece in part.pieces] for part in parts] == [["a.txt", "b.txt"], ["c.txt"]]


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="ab \n", max_size=400), st.integers(5, 60))
def test_cut_text_loses_nothing_but_line_ends_and_keeps_the_limit(text: str, limit: int) -> None:
    documents = list(cut_text(text, limit))
    assert all(len(document) <= limit for document in documents)
    assert "".join(documents).replace("\n", "") == text.replace("\n", "")


def test_cut_text_prefers_blank_lines() -> None:
    assert list(cut_text("aaa\nbb\n\nccc\ndd\n\neee", 16)) == ["aaa\nbb\n\nccc\ndd", "eee"]


def test_file_that_is_gone_or_changed_or_no_parquet_fails_with_its_name(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"no parquet at all")
    (part,) = plan_parts(Files(paths=(str(path),)), 1024)
    with pytest.raises(StageFailed, match=r"'a\.parquet' is not Parquet"):
        list(read_piece(part.pieces[0]))
    path.write_bytes(b"longer than it was before")
    with pytest.raises(StageFailed, match="changed while the step ran"):
        list(read_piece(part.pieces[0]))
    path.unlink()
    with pytest.raises(StageFailed, match=r"does not exist on this node.*every node can read"):
        list(read_piece(part.pieces[0]))


def test_dataset_of_the_hub_out_of_reach_is_transient(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: Any, **options: Any) -> Any:
        assert (args, options) == (("org/data", None), {"split": "train", "revision": "c" * 40})
        raise ConnectionError("no route")

    monkeypatch.setattr("datasets.load_dataset", load)
    with pytest.raises(Transient, match="no route; check the network"):
        open_dataset(HubDataset(id="org/data", revision="c" * 40))


def test_dataset_that_does_not_open_fails_with_its_cause(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(StageFailed, match="cannot open LocalDataset"):
        open_dataset(LocalDataset(path=str(tmp_path)))


def test_python_docs_are_prose_of_modules_and_topics() -> None:
    assert "Return the docstrings" not in read_module("json/decoder.py")
    assert "Simple JSON <https://json.org> decoder" in read_module("json/decoder.py")
    topics = dict(read_topics())
    assert topics["assert"].startswith('The "assert" statement')
    names = [name for name, _ in list_modules()]
    assert names == sorted(names)
    assert not [name for name in names if name.startswith(("test/", "idlelib/", "site-packages/"))]


def test_python_docs_leave_sessions_and_labels_out() -> None:
    import ast

    tree = ast.parse(
        'def a():\n    """Explain at length\n\n      what this function does."""\n'
        'class B:\n    """Short."""\n    def c(self):\n'
        '        """>>> 1 + 1\n        2\n        >>> 2 + 2\n        4\n        """\n'
        'if True:\n    async def d():\n        """A coroutine that is explained as well."""\n'
    )
    assert extract_docstrings(tree) == [
        "Explain at length\n\nwhat this function does.",
        "A coroutine that is explained as well.",
    ]


def test_python_docs_parts_hold_every_module_once() -> None:
    parts = plan_parts(PythonDocs(), 32 * 1024 * 1024)
    assert len(parts) >= 4
    assert [p.name for part in parts for p in part.pieces][1:] == [name for name, _ in list_modules()]
    assert all(one.index + 1 == other.index for one, other in pairwise(parts))
