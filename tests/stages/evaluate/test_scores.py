"""From sums over documents to scores and documents."""

from dataclasses import replace

import numpy as np
import pytest

from stages.candidates import Candidate
from stages.contract import Artifact
from stages.evaluate.scores import Scored, build_documents, build_scores
from stages.formats.scores import REFERENCE
from stages.storage import File


def candidate(name: str, base: str | None = None) -> Candidate:
    names = ("model/config.json", "model/model.safetensors")
    artifact = Artifact("model", name, tuple(File(each, f"/store/{name}/{each}", 100, "0") for each in names))
    return Candidate(name, artifact, "model", "pruned" if base else "model", base and f"of {base}", base)


def scored(one: Candidate, **columns: list[float]) -> Scored:
    sums = {"document_id": [3, 8], "tokens": [10, 30], "nll": [20.0, 40.0], **columns}
    return Scored(one, {name: np.array(values) for name, values in sums.items()}, 1000, {})


def test_scores_of_a_model_whose_base_is_only_the_reference_are_those_to_the_reference() -> None:
    reference = scored(replace(candidate("teacher"), name=REFERENCE))
    half = scored(candidate("half", REFERENCE), **{f"kl/{REFERENCE}": [1.0, 3.0], f"agree/{REFERENCE}": [9.0, 27.0]})
    (entry,) = build_scores([reference, half]).values()
    assert (entry.base, entry.base_fingerprint) == (REFERENCE, f"of {REFERENCE}")
    assert (entry.kl_to_base, entry.agreement_with_base) == (entry.kl_to_reference, entry.agreement)
    assert entry.kl_to_base == pytest.approx(0.1)
    documents = build_documents([reference, half])
    assert documents["half"].kl_to_base.tolist() == [1.0, 3.0]
    assert documents[REFERENCE].kl_to_base is None
