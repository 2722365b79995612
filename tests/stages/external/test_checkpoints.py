"""Checkpoints and tokenizers from outside: identity by content, the hub's border, and every refusal."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stages.errors import ExternalDataError
from stages.external.checkpoints import Checkpoint, PretrainedTokenizer
from stages.external.documents import HubDataset
from stages.storage import File, Folder, fetch
from tests.stages.written import write

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def checkpoint_folder(folder: Path) -> Path:
    return write(folder, config__json="{}", model__safetensors="w", tokenizer__json="{}", README__md="hello")


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
    write(folder, trainer_state__json="{}", all_results__json="{}")
    assert Checkpoint(source=str(folder)).identity() == before
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


def test_checkpoint_saved_in_both_layouts_is_the_file_that_transformers_loads(tmp_path: Path) -> None:
    folder = checkpoint_folder(tmp_path / "m")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "model-00001-of-00001.safetensors"}}')
    (folder / "model-00001-of-00001.safetensors").write_text("left over")
    names = {file.name for file in Checkpoint(source=str(folder)).artifact("f").files}
    assert "model/model.safetensors" in names
    assert not any("00001" in name or "index" in name for name in names)


def test_checkpoint_in_shards_lists_those_of_its_index(tmp_path: Path) -> None:
    index = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})
    folder = write(tmp_path / "m", config__json="{}", consolidated__safetensors="twice")
    write(folder, **{"model.safetensors.index__json": index, "model-1.safetensors": "1", "model-2.safetensors": "2"})
    names = {file.name for file in Checkpoint(source=str(folder)).artifact("f").files}
    assert {"model/model-1.safetensors", "model/model-2.safetensors", "model/model.safetensors.index.json"} <= names
    assert "model/consolidated.safetensors" not in names
    (folder / "model-2.safetensors").unlink()
    with pytest.raises(ExternalDataError, match=r"lacks the weights \['model-2.safetensors'\]"):
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
    with pytest.raises(ExternalDataError, match=message):
        Checkpoint(source=str(write(tmp_path / "m", **files))).identity()


def test_checkpoint_at_a_missing_path_names_the_nearest(tmp_path: Path) -> None:
    checkpoint_folder(tmp_path / "teacher")
    with pytest.raises(ExternalDataError, match=r"does not exist; did you mean '.*/teacher'"):
        Checkpoint(source=str(tmp_path / "techer")).identity()
    with pytest.raises(ExternalDataError, match="has no 'none'"):
        Checkpoint(source=str(tmp_path / "none" / "at" / "all")).identity()


def test_checkpoint_that_is_a_file_or_has_a_needless_revision_is_refused(tmp_path: Path) -> None:
    folder = checkpoint_folder(tmp_path / "m")
    with pytest.raises(ExternalDataError, match="is a file, expected the folder"):
        Checkpoint(source=str(folder / "config.json")).identity()
    with pytest.raises(ExternalDataError, match="revision='main' is for hub ids"):
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
    with pytest.raises(
        ExternalDataError, match=r"cannot be reached \(ConnectionError: no route\).*local path.*HF_TOKEN"
    ):
        Checkpoint(source="org/name").identity()
    with pytest.raises(ExternalDataError, match=r"hub dataset 'org/data' cannot be reached"):
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
    with pytest.raises(ExternalDataError, match="has no tokenizer: expected one of"):
        PretrainedTokenizer(source=str(folder)).identity()


def test_checkpoint_in_s3_has_the_identity_of_its_local_copy(s3: str, tmp_path: Path) -> None:
    folder = checkpoint_folder(tmp_path / "m")
    for path in folder.iterdir():
        Folder.at(f"{s3}/m").put(path.name, path.read_bytes())
    given = Checkpoint(source=f"{s3}/m")
    assert given.identity() == Checkpoint(source=str(folder)).identity()
    assert (given.artifact("f").folder("model") / "model.safetensors").read_text() == "w"
