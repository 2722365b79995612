"""Who keeps the registry's champion: by the records that the store has, of the champion itself or scored again."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.fakes import fake_manifest
from tests.stages.promote.made_up import TEACHER, Made, fingerprint_of, write_scores
from workflows.engine.identity import Fingerprint
from workflows.engine.lease import Holder
from workflows.engine.store import ArtifactStore, seal
from workflows.engine.tracking.champion import champion_stays

OLD, NEW = "a" * 64, "b" * 64


def keep_scores(folder: Path, fingerprint: str, models: dict[str, Made], seed: int = 0) -> None:
    """Commit scores of made-up models to the store in a folder."""
    store = ArtifactStore(str(folder))
    claim = store.claim(Fingerprint(fingerprint), "run")
    assert not isinstance(claim, Holder)
    write_scores(Path(store.out(claim).uri), {"teacher": TEACHER, **models}, seed=seed)
    files = seal(store.out(claim), store.resume(claim), store.folder(fingerprint))
    store.commit(claim, fake_manifest(claim, kind="scores", files=files))


class Registry:
    """Versions and their tags, as MLflow's client gives and takes them."""

    def __init__(self, **candidates: str) -> None:
        self.tags = {version: self.tags_of(version, name) for version, name in candidates.items()}

    def tags_of(self, version: str, name: str) -> dict[str, str]:
        scores = OLD if version == "old" else NEW
        return {
            "candidate": name,
            "scores": scores,
            "artifact": f"s3://bucket/{name}",
            "fingerprint": fingerprint_of(name),
        }

    def get_model_version(self, name: str, version: str) -> Any:
        return SimpleNamespace(tags=self.tags[version])

    def set_model_version_tag(self, name: str, version: str, key: str, value: str) -> None:
        self.tags[version][key] = value

    def stays(self, folder: Path) -> bool:
        return champion_stays(str(folder), self, "house", "old", "new")


def test_champion_smaller_newcomer_on_the_same_text_takes_its_place(tmp_path: Path) -> None:
    keep_scores(tmp_path, OLD, {"first": Made(0.1)})
    keep_scores(tmp_path, NEW, {"second": Made(0.1, size_bytes=1_000_000)})
    registry = Registry(old="first", new="second")
    assert not registry.stays(tmp_path)
    assert registry.tags["new"]["challenge"].startswith("second is smaller")


@pytest.mark.parametrize("seed", [0, 1], ids=["worse", "scored on other text"])
def test_champion_newcomer_that_is_not_shown_to_be_as_good_changes_nothing(
    tmp_path: Path, seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    excess = 0.3 if seed == 0 else 0.01
    keep_scores(tmp_path, OLD, {"first": Made(0.1)})
    keep_scores(tmp_path, NEW, {"second": Made(excess, size_bytes=4_000_000 + (seed == 0))}, seed=seed)
    assert Registry(old="first", new="second").stays(tmp_path)
    assert "version old stays" in caplog.text
    assert ("compress: --champion s3://bucket/first" in caplog.text) == (seed == 1)


def test_champion_scored_again_beside_the_newcomers_is_compared_there(tmp_path: Path) -> None:
    """Its own record is of other text; its checkpoint, scored under another name, is found by where it lies."""
    keep_scores(tmp_path, OLD, {"first": Made(0.1)}, seed=1)
    again = {"first": Made(0.1), "second": Made(0.05)}
    keep_scores(tmp_path, NEW, again)
    assert not Registry(old="first", new="second").stays(tmp_path)


def test_champion_that_is_accepted_again_itself_stays(tmp_path: Path) -> None:
    registry = Registry(old="first", new="first")
    assert registry.stays(tmp_path)
    assert registry.tags["new"]["challenge"] == "first is the champion itself, scored again"


def test_champion_whose_record_is_gone_stays(tmp_path: Path) -> None:
    keep_scores(tmp_path, NEW, {"second": Made(0.05, size_bytes=1_000_000)})
    registry = Registry(old="first", new="second")
    assert registry.stays(tmp_path)
    assert "has no scores aaaaaaaaaaaa" in registry.tags["new"]["challenge"]
