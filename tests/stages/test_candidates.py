"""Which candidates artifacts hold, and what each was derived from."""

from pathlib import Path

import pytest

from stages.candidates import read_candidates
from stages.contract import Artifact
from stages.errors import StageFailed
from stages.formats.derivation import Derivation
from stages.storage import Folder
from tests.fakes import artifact_of
from tests.stages.evaluate.tiny import make_search


def checkpoint(folder: Path, text: str = "") -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"text": "' + text + '"}')
    (folder / "model.safetensors").write_bytes(b"weights")


def model(folder: Path, derived: Derivation | None = None) -> Artifact:
    checkpoint(folder / "model", folder.name)
    if derived:
        derived.write(Folder.at(folder))
    return artifact_of("model", folder)


def test_candidates_are_models_and_the_finalists_of_searches(tmp_path):
    student = model(tmp_path / "student")
    checkpoint(tmp_path / "search" / "finalists" / "w4")
    search = make_search(tmp_path / "search", student, ("w4",))
    first, second = read_candidates({"found": search, "student": student})
    assert (first.name, first.kind, first.base_fingerprint, first.base) == ("student", "model", None, None)
    assert (second.name, second.folder, second.kind) == ("student.w4", "finalists/w4", "quantized")
    assert (second.base, second.base_fingerprint, second.method) == ("student", student.fingerprint, "w4")
    assert first.config == {"text": "student"}


def test_candidate_of_a_search_without_its_base_still_has_one(tmp_path):
    student = model(tmp_path / "student")
    checkpoint(tmp_path / "search" / "finalists" / "w4")
    search = make_search(tmp_path / "search", student, ("w4",))
    (found,) = read_candidates({"found": search})
    assert (found.name, found.base, found.base_fingerprint) == ("found.w4", None, student.fingerprint)


def test_candidate_whose_artifact_says_that_it_is_derived_has_a_base(tmp_path):
    student = model(tmp_path / "student")
    derived = Derivation(base=student.fingerprint, kind="pruned", method="width-50")
    half = model(tmp_path / "half", derived)
    _, found = read_candidates({"student": student, "half": half})
    assert (found.name, found.kind, found.method) == ("half", "pruned", "width-50")
    assert (found.base, found.base_fingerprint) == ("student", student.fingerprint)


def test_candidates_of_one_name_are_refused(tmp_path):
    student = model(tmp_path / "student")
    for name in ("one", "two"):
        checkpoint(tmp_path / name / "finalists" / "w4", name)
    searches = {name: make_search(tmp_path / name, student, ("w4",)) for name in ("one", "two")}
    with pytest.raises(StageFailed, match=r"several candidates are named student\.w4"):
        read_candidates({"student": student, **searches})


def test_candidate_without_weights_is_refused(tmp_path):
    student = model(tmp_path / "student")
    bare = Artifact("model", "0" * 64, student.below("model/config.json"))
    with pytest.raises(StageFailed, match=r"candidate 'bare' has no model/\*\.safetensors"):
        read_candidates({"bare": bare})
