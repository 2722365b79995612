"""Data from outside: identity by content, the digest cache, the hub's border, and every refusal."""

import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import TypeAdapter

from stages import digests
from stages.digests import digest_files
from stages.errors import OutsideError
from stages.outside import Checkpoint, Files, HubDataset, LocalDataset, PretrainedTokenizer, PythonDocs, Source
from stages.prepare.parts import plan_parts
from stages.prepare.reading import read_piece
from stages.storage import File, Folder, fetch

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def checkpoint_folder(folder: Path) -> Path:
    return write(folder, config__json="{}", model__safetensors="w", tokenizer__json="{}", README__md="hello")


def settle(path: Path) -> None:
    """Make a file look old enough to be cached."""
    os.utime(path, ns=(10**18, 10**18))


# ---------------------------------------------------------------- digests


def test_digests_of_a_settled_file_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, a__txt="one") / "a.txt"
    settle(path)
    first = digest_files({"a": path})
    monkeypatch.setattr(digests, "_sha256", lambda path: pytest.fail("read again"))
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


# ---------------------------------------------------------------- checkpoints


def test_checkpoint_identity_does_not_depend_on_where_it_lies(tmp_path: Path) -> None:
    one, other = checkpoint_folder(tmp_path / "one"), checkpoint_folder(tmp_path / "deep" / "other")
    assert Checkpoint(source=str(one)).identity() == Checkpoint(source=str(other)).identity()
    assert [name for name, _ in Checkpoint(source=str(one)).identity()["files"]] == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]


def test_checkpoint_identity_changes_with_a_weight(tmp_path: Path) -> None:
    folder = checkpoint_folder(tmp_path / "one")
    before = Checkpoint(source=str(folder)).identity()
    (folder / "model.safetensors").write_text("v")
    assert Checkpoint(source=str(folder)).identity() != before


def test_checkpoint_artifact_lies_where_it_is_and_lists_no_pickle(tmp_path: Path) -> None:
    folder = checkpoint_folder(tmp_path / "one")
    write(folder, training_args__bin="pickle", optimizer__pt="pickle")
    artifact = Checkpoint(source=str(folder)).artifact("f" * 64)
    assert artifact.kind == "model"
    assert artifact.folder("model") == folder
    assert {file.name for file in artifact.files} == {
        "model/config.json",
        "model/model.safetensors",
        "model/tokenizer.json",
    }


def test_checkpoint_in_shards_lists_those_of_its_index(tmp_path: Path) -> None:
    index = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})
    folder = write(tmp_path / "m", config__json="{}", consolidated__safetensors="twice")
    write(folder, **{"model.safetensors.index__json": index, "model-1.safetensors": "1", "model-2.safetensors": "2"})
    names = {file.name for file in Checkpoint(source=str(folder)).artifact("f").files}
    assert {"model/model-1.safetensors", "model/model-2.safetensors", "model/model.safetensors.index.json"} <= names
    assert "model/consolidated.safetensors" not in names
    (folder / "model-2.safetensors").unlink()
    with pytest.raises(OutsideError, match=r"lacks the weights \['model-2.safetensors'\]"):
        Checkpoint(source=str(folder)).identity()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"model__safetensors": ""}, r"has no config\.json.*save_pretrained"),
        (
            {"config__json": "{}", "pytorch_model__bin": ""},
            r"only pickled weights \(pytorch_model\.bin\).*save_pretrained",
        ),
        ({"config__json": "{}", "weights__ckpt": ""}, r"only pickled weights.*safetensors only"),
        ({"config__json": "{}"}, "has no weights; expected model.safetensors"),
    ],
    ids=["no-config", "bin", "ckpt", "no-weights"],
)
def test_checkpoint_without_usable_files_is_refused(tmp_path: Path, files: dict[str, str], message: str) -> None:
    with pytest.raises(OutsideError, match=message):
        Checkpoint(source=str(write(tmp_path / "m", **files))).identity()


def test_checkpoint_at_a_missing_path_names_the_nearest(tmp_path: Path) -> None:
    checkpoint_folder(tmp_path / "teacher")
    with pytest.raises(OutsideError, match=r"does not exist; did you mean '.*/teacher'"):
        Checkpoint(source=str(tmp_path / "techer")).identity()
    with pytest.raises(OutsideError, match="has no 'none'"):
        Checkpoint(source=str(tmp_path / "none" / "at" / "all")).identity()


def test_checkpoint_that_is_a_file_or_has_a_needless_revision_is_refused(tmp_path: Path) -> None:
    folder = checkpoint_folder(tmp_path / "m")
    with pytest.raises(OutsideError, match="is a file, expected the folder"):
        Checkpoint(source=str(folder / "config.json")).identity()
    with pytest.raises(OutsideError, match="revision='main' is for hub ids"):
        Checkpoint(source=str(folder), revision="main").identity()


# ---------------------------------------------------------------- the hub


class FakeHub:
    """Stands for `huggingface_hub.HfApi`."""

    siblings = (
        SimpleNamespace(rfilename="config.json", size=2, lfs=None),
        SimpleNamespace(rfilename="model.safetensors", size=7, lfs=SimpleNamespace(sha256="a" * 64)),
        SimpleNamespace(rfilename="tokenizer.json", size=3, lfs=None),
        SimpleNamespace(rfilename="pytorch_model.bin", size=7, lfs=SimpleNamespace(sha256="b" * 64)),
    )

    def model_info(self, repo_id: str, *, revision: str | None, files_metadata: bool) -> Any:
        return SimpleNamespace(sha=COMMIT, siblings=self.siblings)

    def dataset_info(self, repo_id: str, *, revision: str | None) -> Any:
        return SimpleNamespace(sha=COMMIT)


def test_checkpoint_of_the_hub_is_pinned_to_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub)
    given = Checkpoint(source="org/name", revision="main")
    assert given.identity() == {"kind": "hub", "id": "org/name", "revision": COMMIT}
    files = {file.name: file for file in given.artifact("f").files}
    assert set(files) == {"model/config.json", "model/model.safetensors", "model/tokenizer.json"}
    weights = files["model/model.safetensors"]
    assert weights == File("model/model.safetensors", f"hf://org/name@{COMMIT}/model.safetensors", 7, "a" * 64)
    assert PretrainedTokenizer(source="org/name").identity()["revision"] == COMMIT
    assert HubDataset(id="org/data").identity() == {
        "kind": "hub-dataset",
        "id": "org/data",
        "config": None,
        "split": "train",
        "revision": COMMIT,
    }


def test_fetch_of_a_hub_file_asks_for_exactly_its_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(repo_id: str, name: str, *, revision: str) -> str:
        asked.append((repo_id, name, revision))
        return str(tmp_path / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    path = fetch(File("model/x/y.json", f"hf://org/name@{COMMIT}/x/y.json", 1, ""), tmp_path)
    assert path == tmp_path / "x/y.json"
    assert asked == [("org/name", "x/y.json", COMMIT)]


def test_checkpoint_of_the_hub_out_of_reach_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unreachable:
        def model_info(self, *args: Any, **options: Any) -> Any:
            raise ConnectionError("no route")

        dataset_info = model_info

    monkeypatch.setattr("huggingface_hub.HfApi", Unreachable)
    with pytest.raises(OutsideError, match=r"cannot be reached \(ConnectionError: no route\).*local path.*HF_TOKEN"):
        Checkpoint(source="org/name").identity()
    with pytest.raises(OutsideError, match=r"hub dataset 'org/data' cannot be reached"):
        HubDataset(id="org/data").identity()
    assert HubDataset(id="org/data", revision=COMMIT).identity()["revision"] == COMMIT


def test_checkpoint_of_the_hub_in_the_cache_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint_folder(tmp_path / "snapshot")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: str(folder))
    given = Checkpoint(source="org/name", revision=COMMIT)
    assert given.identity() == {"kind": "hub", "id": "org/name", "revision": COMMIT}
    assert given.artifact("f").folder("model") == folder


# ---------------------------------------------------------------- tokenizers and documents


def test_tokenizer_identity_leaves_the_weights_out(tmp_path: Path) -> None:
    folder = checkpoint_folder(tmp_path / "m")
    before = PretrainedTokenizer(source=str(folder)).identity()
    (folder / "model.safetensors").write_text("other")
    assert PretrainedTokenizer(source=str(folder)).identity() == before
    (folder / "tokenizer.json").unlink()
    with pytest.raises(OutsideError, match="has no tokenizer: expected one of"):
        PretrainedTokenizer(source=str(folder)).identity()


def test_source_is_told_apart_by_its_kind() -> None:
    parsed = TypeAdapter(Source).validate_python({"kind": "files", "paths": ["a.txt"]})
    assert parsed == Files(paths=("a.txt",))


def test_python_docs_identity_is_version_and_revision() -> None:
    assert set(PythonDocs().identity()) == {"kind", "python", "revision"}


def test_files_identity_does_not_depend_on_where_they_lie(tmp_path: Path) -> None:
    for place in ("one", "other"):
        write(tmp_path / place / "deep", b__md="B", c__png="no", **{".hidden__txt": "no"})
        write(tmp_path / place, a__txt="A")
    one, other = Files(paths=(str(tmp_path / "one"),)), Files(paths=(str(tmp_path / "other"),))
    assert one.identity() == other.identity()
    assert [file.name for file in one.files()] == ["a.txt", "deep/b.md"]
    (tmp_path / "other" / "a.txt").write_text("changed")
    assert one.identity() != other.identity()


def test_files_by_glob_and_path_are_taken_once(tmp_path: Path) -> None:
    folder = write(tmp_path / "x", a__jsonl="{}", b__jsonl="{}")
    write(folder / "sub", c__jsonl="{}")
    assert len(Files(paths=(f"{folder}/*.jsonl", f"{folder}/a.jsonl")).files()) == 2
    assert len(Files(paths=(f"{folder}/**/*.jsonl",)).files()) == 3


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("corpus.tx", r"does not exist; did you mean '.*/corpus\.txt'"),
        ("*.jsonl", r"matches no file to read; expected \.txt"),
        ("picture.png", r"cannot read documents from .*picture\.png"),
        ("pictures", r"matches no file to read \(1 other files, such as 'x\.png'\)"),
    ],
    ids=["missing", "glob", "format", "folder"],
)
def test_files_that_cannot_be_read_are_refused(tmp_path: Path, path: str, message: str) -> None:
    write(tmp_path, corpus__txt="A", picture__png="")
    write(tmp_path / "pictures", x__png="")
    with pytest.raises(OutsideError, match=message):
        Files(paths=(str(tmp_path / path),)).identity()


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
        with pytest.raises(OutsideError, match=message):
            source.identity()


# ---------------------------------------------------------------- object stores


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    import urllib.request

    for name, value in {
        "AWS_ENDPOINT_URL": s3,
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_REGION": "us-east-1",
        "AWS_ALLOW_HTTP": "true",
    }.items():
        monkeypatch.setenv(name, value)
    urllib.request.urlopen(urllib.request.Request(f"{s3}/outside", method="PUT")).close()
    return lambda name, text: Folder.at("s3://outside").put(name, text.encode()) and None


def test_files_in_s3_have_the_identity_of_their_local_copy(bucket: Callable[[str, str], None], tmp_path: Path) -> None:
    for name, text in {"a.txt": "A", "deep/b.jsonl": '{"text": "B"}', "deep/x.png": ""}.items():
        bucket(f"corpus/{name}", text)
        write((tmp_path / "corpus" / name).parent, **{name.rsplit("/")[-1]: text})
    remote, local = Files(paths=("s3://outside/corpus",)), Files(paths=(str(tmp_path / "corpus"),))
    assert remote.identity() == local.identity()
    assert [file.name for file in Files(paths=("s3://outside/corpus/**/*.jsonl",)).files()] == ["deep/b.jsonl"]
    assert [file.name for file in Files(paths=("s3://outside/corpus/*",)).files()] == ["a.txt"]
    assert [file.name for file in Files(paths=("s3://outside/corpus/a.txt",)).files()] == ["a.txt"]
    with pytest.raises(OutsideError, match=r"did you mean 's3://outside/corpus/a\.txt'"):
        Files(paths=("s3://outside/corpus/aa.txt",)).identity()
    with pytest.raises(OutsideError, match="matches no file"):
        Files(paths=("s3://outside/corpse",)).identity()


def test_files_in_s3_are_planned_and_read_as_their_local_copy(
    bucket: Callable[[str, str], None], tmp_path: Path
) -> None:
    lines = "".join(json.dumps({"text": f"row {i} é"}, ensure_ascii=False) + "\n" for i in range(300))
    bucket("lines/a.jsonl", lines)
    write(tmp_path / "lines", a__jsonl=lines)
    read = []
    for place in ("s3://outside/lines", str(tmp_path / "lines")):
        parts = plan_parts(Files(paths=(place,)), 2048)
        assert len(parts) > 2
        read.append([[(row.number, row.value) for piece in part.pieces for row in read_piece(piece)] for part in parts])
    assert read[0] == read[1]
    assert [value["text"] for part in read[0] for _, value in part] == [f"row {i} é" for i in range(300)]


def test_checkpoint_in_s3_has_the_identity_of_its_local_copy(
    bucket: Callable[[str, str], None], tmp_path: Path
) -> None:
    folder = checkpoint_folder(tmp_path / "m")
    for path in folder.iterdir():
        bucket(f"m/{path.name}", path.read_text())
    given = Checkpoint(source="s3://outside/m")
    assert given.identity() == Checkpoint(source=str(folder)).identity()
    assert (given.artifact("f").folder("model") / "model.safetensors").read_text() == "w"


def test_files_in_a_missing_bucket_are_out_of_reach(bucket: Callable[[str, str], None]) -> None:
    with pytest.raises(OutsideError, match=r"cannot list 's3://absent/x'.*credentials"):
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
