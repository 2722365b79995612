"""Documents from outside: identity by content on disk and in S3, and every refusal."""

import json
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from stages.errors import ExternalDataError
from stages.external.documents import DocumentSource, Files, LocalDataset, PythonDocs
from stages.prepare.parts import plan_parts
from stages.prepare.reading import read_piece
from stages.storage import Folder
from tests.stages.written import write


def test_source_is_told_apart_by_its_kind() -> None:
    parsed = TypeAdapter(DocumentSource).validate_python({"kind": "files", "paths": ["a.txt"]})
    assert parsed == Files(paths=("a.txt",))


def test_python_docs_identity_is_version_and_revision() -> None:
    assert set(PythonDocs().identity()) == {"kind", "python", "revision"}


def test_files_identity_does_not_depend_on_where_they_lie(tmp_path: Path) -> None:
    for place in ("one", "other"):
        write(tmp_path / place / "deep", b__md="B", c__png="no", **{".hidden__txt": "no"})
        write(tmp_path / place, a__txt="A")
    one, other = Files(paths=(str(tmp_path / "one"),)), Files(paths=(str(tmp_path / "other"),))
    assert one.identity() == other.identity()
    write(tmp_path / "one", C__JSONL="{}")
    assert [file.name for file in one.files()] == ["C.JSONL", "a.txt", "deep/b.md"]
    (tmp_path / "other" / "a.txt").write_text("changed")
    assert one.identity() != other.identity()


def test_files_by_glob_and_path_are_taken_once(tmp_path: Path) -> None:
    folder = write(tmp_path / "x", a__jsonl="{}", b__jsonl="{}")
    write(folder / "sub", c__jsonl="{}")
    assert len(Files(paths=(f"{folder}/*.jsonl", f"{folder}/a.jsonl")).files()) == 2
    assert len(Files(paths=(f"{folder}/**/*.jsonl",)).files()) == 3


def test_files_by_glob_below_a_folder_whose_name_looks_like_one_are_found(tmp_path: Path) -> None:
    folder = write(tmp_path / "texts [2026]", a__jsonl="{}")
    assert [file.name for file in Files(paths=(f"{folder}/*.jsonl",)).files()] == ["a.jsonl"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("corpus.tx", r"does not exist; did you mean '.*/corpus\.txt'"),
        ("*.jsonl", r"matches no file to read; expected \.txt"),
        ("picture.png", r"cannot read documents from .*picture\.png"),
        ("packed", r"holds 1 compressed files, such as 'b\.jsonl\.gz', which cannot be read; unpack them"),
        ("packed/*", r"holds 1 compressed files, such as 'b\.jsonl\.gz', which cannot be read; unpack them"),
        ("pictures", r"matches no file to read \(1 other files, such as 'x\.png'\)"),
    ],
    ids=["missing", "glob", "format", "compressed-in-folder", "compressed-in-glob", "folder"],
)
def test_files_that_cannot_be_read_are_refused(tmp_path: Path, path: str, message: str) -> None:
    write(tmp_path, corpus__txt="A", picture__png="")
    write(tmp_path / "pictures", x__png="")
    write(tmp_path / "packed", a__jsonl="{}", b__jsonl__gz="")
    with pytest.raises(ExternalDataError, match=message):
        Files(paths=(str(tmp_path / path),)).identity()


CARD = """---
license: mit
configs:
- config_name: small
  data_files: small/*.jsonl
- config_name: default
  data_files:
  - split: train
    path: [data/part-*.jsonl, more.jsonl]
  - split: test
    path: data/held-*.jsonl
---
# A dataset
"""


def clone(folder: Path, *names: str, card: str = "# A dataset\n") -> Path:
    """Write a clone of a dataset repository."""
    about = ("dataset_infos.json", "LICENSE", "LICENSE.txt", ".gitattributes", ".git/config.json")
    for name in (*about, *names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    (folder / "README.md").write_text(card)
    return folder


@pytest.mark.parametrize(
    ("names", "card", "read"),
    [
        (("a.jsonl", "b.txt"), "# x", ["a.jsonl", "b.txt"]),
        (
            ("data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl"),
            "# x",
            ["data/train-00000-of-00001.jsonl"],
        ),
        (("train/a.jsonl", "validation/train.jsonl", "other.jsonl"), "# x", ["train/a.jsonl"]),
        (("a.jsonl", "my_test.jsonl"), "# x", ["a.jsonl"]),
        (("test.jsonl", "dev.jsonl"), "# x", ["dev.jsonl", "test.jsonl"]),
        (("contest.jsonl", "trainer.jsonl"), "# x", ["contest.jsonl", "trainer.jsonl"]),
        (
            ("data/part-1.jsonl", "more.jsonl", "data/held-1.jsonl", "small/a.jsonl", "z.jsonl"),
            CARD,
            ["data/part-1.jsonl", "more.jsonl"],
        ),
        (("x.jsonl", "y.jsonl"), "---\nconfigs:\n- config_name: one\n  data_files: x.jsonl\n---\n", ["x.jsonl"]),
    ],
    ids=["about", "shards", "folders", "no-train", "held-out-alone", "words", "card", "card-of-one"],
)
def test_data_files_of_a_cloned_dataset_are_told_as_the_hub_does(
    tmp_path: Path, names: tuple[str, ...], card: str, read: list[str]
) -> None:
    source = Files(paths=(str(clone(tmp_path / "d", *names, card=card)),))
    assert [file.name for file in source.files()] == read
    (note,) = source.notes()
    assert f"{len(read)} files are read; left out: LICENSE and 3 more (about the data)" in note
    for name in set(names) - set(read):
        assert name in note or "and" in note


def test_split_of_a_cloned_dataset_may_be_named(tmp_path: Path) -> None:
    folder = clone(tmp_path / "d", "data/part-1.jsonl", "data/held-1.jsonl", card=CARD)
    assert [file.name for file in Files(paths=(str(folder),), split="test").files()] == ["data/held-1.jsonl"]
    with pytest.raises(
        ExternalDataError, match=r"no file of the split 'dev' that is there .*\(its splits: test, train\)"
    ):
        Files(paths=(str(folder),), split="dev").files()


def test_card_with_several_configurations_and_no_default_is_refused_with_their_names(tmp_path: Path) -> None:
    card = "---\nconfigs:\n- {config_name: a, data_files: a.jsonl}\n- {config_name: b, data_files: b.jsonl}\n---\n"
    folder = clone(tmp_path / "d", "a.jsonl", "b.jsonl", card=card)
    with pytest.raises(ExternalDataError, match="has the configurations a, b and no default; give the files"):
        Files(paths=(str(folder),)).files()
    assert [file.name for file in Files(paths=(f"{folder}/a.jsonl",)).files()] == ["a.jsonl"]


def test_card_is_read_as_text_where_it_is_asked_for(tmp_path: Path) -> None:
    folder = clone(tmp_path / "d", "a.md")
    assert [file.name for file in Files(paths=(f"{folder}/*.md",)).files()] == ["README.md", "a.md"]
    assert [file.name for file in Files(paths=(f"{folder}/README.md",)).files()] == ["README.md"]
    assert [file.name for file in Files(paths=(f"{folder}/*",)).files()] == ["a.md"]


def test_folder_with_brackets_in_its_name_before_a_glob_is_found(tmp_path: Path) -> None:
    folder = write(tmp_path / "runs [2026]" / "x", a__jsonl="{}").parent
    assert [file.name for file in Files(paths=(f"{folder}/**/*.jsonl",)).files()] == ["x/a.jsonl"]


def test_local_dataset_identity_is_that_of_its_rows(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": ["a", "b"]})
    datasets.disable_progress_bars()
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "two")
    one = LocalDataset(path=str(tmp_path / "one"))
    assert one.identity() == LocalDataset(path=str(tmp_path / "two"), split="train").identity()
    refusals: list[tuple[LocalDataset, str]] = [
        (
            LocalDataset(path=str(tmp_path / "two"), split="test"),
            r"DatasetDict, but split='test' is none of \['train'\]",
        ),
        (LocalDataset(path=str(tmp_path / "one"), split="train"), "plain Dataset"),
        (LocalDataset(path=str(tmp_path / "on")), "did you mean"),
        (LocalDataset(path=str(tmp_path)), "is no dataset"),
    ]
    for source, message in refusals:
        with pytest.raises(ExternalDataError, match=message):
            source.identity()


def test_files_in_s3_have_the_identity_of_their_local_copy(s3: str, tmp_path: Path) -> None:
    for name, text in {"a.txt": "A", "deep/b.jsonl": '{"text": "B"}', "deep/x.png": "", ".cache/c.jsonl": "{}"}.items():
        Folder.at(f"{s3}/corpus").put(name, text.encode())
        write((tmp_path / "corpus" / name).parent, **{name.rsplit("/")[-1]: text})
    remote, local = Files(paths=(f"{s3}/corpus",)), Files(paths=(str(tmp_path / "corpus"),))
    assert remote.identity() == local.identity()
    assert [file.name for file in Files(paths=(f"{s3}/corpus/**/*.jsonl",)).files()] == ["deep/b.jsonl"]
    assert [file.name for file in Files(paths=(f"{s3}/corpus/*",)).files()] == ["a.txt"]
    assert [file.name for file in Files(paths=(f"{s3}/corpus/a.txt",)).files()] == ["a.txt"]
    with pytest.raises(ExternalDataError, match=rf"did you mean '{s3}/corpus/a\.txt'"):
        Files(paths=(f"{s3}/corpus/aa.txt",)).identity()
    with pytest.raises(ExternalDataError, match="matches no file"):
        Files(paths=(f"{s3}/corpse",)).identity()


def test_files_in_s3_are_planned_and_read_as_their_local_copy(s3: str, tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": f"row {i} é"}, ensure_ascii=False) + "\n" for i in range(300))
    Folder.at(f"{s3}/lines").put("a.jsonl", lines.encode())
    write(tmp_path / "lines", a__jsonl=lines)
    read = []
    for place in (f"{s3}/lines", str(tmp_path / "lines")):
        parts = plan_parts(Files(paths=(place,)), 2048)
        assert len(parts) > 2
        read.append([[(row.number, row.value) for piece in part.pieces for row in read_piece(piece)] for part in parts])
    assert read[0] == read[1]
    assert [value["text"] for part in read[0] for _, value in part] == [f"row {i} é" for i in range(300)]


def test_files_in_a_missing_bucket_are_out_of_reach(s3: str) -> None:
    with pytest.raises(ExternalDataError, match=r"cannot list 's3://absent/x'.*credentials"):
        Files(paths=("s3://absent/x",)).identity()


def test_resolved_stage_has_absolute_paths_and_the_same_identity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stages.prepare.stage import Prepare

    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("text")
    stage = Prepare(source=Files(paths=("a.txt",)), sequence_length=16)
    resolved = stage.resolved()
    assert resolved.source == Files(paths=(str(tmp_path / "a.txt"),))
    assert resolved.source.identity() == stage.source.identity()
