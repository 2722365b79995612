"""Parts and pieces: nothing is lost or read twice, wherever a file is divided."""

import codecs
import json
import tempfile
import tracemalloc
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
from stages.prepare import reading
from stages.prepare.decoding import cut_text
from stages.prepare.opening import open_dataset
from stages.prepare.parts import plan_parts
from stages.prepare.python_docs import extract_docstrings, list_modules, read_module, read_topics
from stages.prepare.reading import first_row_number, read_piece


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
    found = rows(Files(paths=(str(tmp_path),)), 1024)
    assert found[0][2] == "a JSON int, expected an object with fields"
    assert found[1][:2] == ("a.json", 2)
    assert found[1][2].startswith("not JSON")


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


@pytest.mark.parametrize(
    ("text", "encoding", "problem"),
    [
        ("a\nbé", "latin-1", "not UTF-8 at byte 3 (line 2); it may be latin-1 or windows-1252"),
        ("a\nbé", "utf-16-le", "not UTF-8 at byte 6 (line 2); it may be utf-16 without a byte order mark"),
    ],
)
def test_text_in_another_encoding_is_a_problem_at_its_byte_and_line(
    tmp_path: Path, text: str, encoding: str, problem: str
) -> None:
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    ((name, number, found),) = rows(Files(paths=(str(tmp_path),)), 1024)
    assert (name, number) == ("a.txt", 1)
    assert found.startswith(problem)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_file_whose_mark_names_its_encoding_is_read_in_it(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.txt").write_bytes("né\r\nb".encode(encoding))
    (tmp_path / "b.jsonl").write_bytes("".join(f'{{"n": "é{i}"}}\n' for i in range(300)).encode(encoding))
    (tmp_path / "c.json").write_bytes('[{"n": "é"}]'.encode(encoding))
    found = rows(Files(paths=(str(tmp_path),)), 1024)
    assert [value for name, _, value in found if name == "a.txt"] == ["né\nb"]
    assert [value["n"] for name, _, value in found if name == "b.jsonl"] == [f"é{i}" for i in range(300)]
    assert [value["n"] for name, _, value in found if name == "c.json"] == ["é"]


def test_line_in_another_encoding_is_a_problem_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"n": 1}\n{"n": "\xe9"}\n{"n": 3}\n')
    found = rows(Files(paths=(str(tmp_path),)), 10**6)
    assert [number for _, number, _ in found] == [1, 2, 3]
    assert found[1][2] == "not UTF-8 at byte 7 of the line; write the file again as UTF-8"


@pytest.mark.parametrize(("name", "head", "tail"), [("a.jsonl", "", ""), ("a.json", "[", "]")])
def test_row_that_is_too_long_is_a_problem_and_takes_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, head: str, tail: str
) -> None:
    monkeypatch.setattr(reading, "MAX_ROW_BYTES", 300_000)
    monkeypatch.setattr(reading, "CHUNK", 100_000)
    between = "," if head else "\n"
    lines = ['{"n": 1}', json.dumps({"n": "x" * 9_000_000}), '{"n": 3}']
    (tmp_path / name).write_text(head + between.join(lines) + tail)
    pieces = [piece for part in plan_parts(Files(paths=(str(tmp_path),)), 10**6) for piece in part.pieces]
    tracemalloc.start()
    found = [(first_row_number(piece) + row.number, row) for piece in pieces for row in read_piece(piece)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3_000_000
    assert (found[0][0], found[0][1].value) == (1, {"n": 1})
    assert found[1][0] == 2
    assert "bytes, expected at most 300000; divide it into several rows" in str(found[1][1].problem)
    if not head:
        assert "a line of 9000010 bytes" in str(found[1][1].problem)
        assert (found[2][0], found[2][1].value) == (3, {"n": 3})


def test_text_in_one_line_takes_no_memory(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("word " * 4_000_000)
    (part,) = plan_parts(Files(paths=(str(tmp_path),)), 10**8)
    tracemalloc.start()
    num_characters = sum(len(row.value) for row in read_piece(part.pieces[0]))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert num_characters == 20_000_000
    assert peak < 8_000_000


@given(
    st.lists(st.recursive(st.integers() | st.text(), lambda v: st.lists(v) | st.dictionaries(st.text(), v))),
    st.integers(1, 40),
)
@settings(max_examples=20, deadline=None)
def test_json_list_is_read_as_json_reads_it_whatever_is_read_in_one_go(values: list[Any], chunk: int) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "CHUNK", chunk)
        patch.setenv("STILLHOUSE_CACHE", folder)
        (Path(folder) / "a.json").write_text(json.dumps([{"v": value} for value in values], indent=chunk % 3 or None))
        found = rows(Files(paths=(f"{folder}/a.json",)), 10**6)
    assert [value["v"] for _, _, value in found] == values


def test_parquet_objects_lack_the_keys_that_other_rows_gave_them(tmp_path: Path) -> None:
    calls = [{"name": "add", "arguments": {"a": 1}}, {"name": "mul", "arguments": {"b": 2}}]
    pq.write_table(pa.table({"calls": [[call] for call in calls], "note": [None, "x"]}), tmp_path / "a.parquet")
    found = [value for _, _, value in rows(Files(paths=(str(tmp_path),)), 10**6)]
    assert found == [{"calls": [calls[0]], "note": None}, {"calls": [calls[1]], "note": "x"}]


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
