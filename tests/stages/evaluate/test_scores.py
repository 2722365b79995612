"""From sums over documents to scores and documents."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from stages.candidates import Candidate
from stages.contract import Artifact
from stages.evaluate.scores import Scored, build_documents, build_models, build_scores
from stages.evaluate.text import TextFacts
from stages.formats.scores import REFERENCE, Scores
from stages.storage import File


@pytest.fixture(autouse=True)
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each checkpoint's `config.json`, which scores hold."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text("{}")


def candidate(name: str, base: str | None = None) -> Candidate:
    names = ("config.json", "model.safetensors")
    artifact = Artifact(
        "model", name, tuple(File(f"model/{each}", str(Path(each).absolute()), 100, "0") for each in names)
    )
    return Candidate(name, artifact, "model", "pruned" if base else "model", base and f"of {base}", base)


def scored(one: Candidate, **columns: list[float]) -> Scored:
    sums = {"document_id": [3, 8], "tokens": [10, 30], "nll": [20.0, 40.0], **columns}
    return Scored(one, {name: np.array(values) for name, values in sums.items()}, 1000, {})


def test_scores_of_a_model_whose_base_is_only_the_reference_are_those_to_the_reference() -> None:
    reference = scored(replace(candidate("teacher"), name=REFERENCE))
    half = scored(candidate("half", REFERENCE), **{f"kl/{REFERENCE}": [1.0, 3.0], f"agree/{REFERENCE}": [9.0, 27.0]})
    (entry,) = build_models([reference, half], TextFacts(120, 0)).values()
    assert (entry.base, entry.base_fingerprint) == (REFERENCE, f"of {REFERENCE}")
    assert (entry.kl_to_base, entry.agreement_with_base) == (entry.kl_to_reference, entry.agreement)
    assert entry.kl_to_base == pytest.approx(0.1)
    documents = build_documents([reference, half])
    assert documents["half"].kl_to_base.tolist() == [1.0, 3.0]
    assert documents[REFERENCE].kl_to_base is None


def test_scores_tell_bits_per_byte_and_compression_against_16_bits() -> None:
    teacher, small = (
        scored(candidate("teacher")),
        scored(candidate("small"), **{"kl/teacher": [1.0, 3.0], "agree/teacher": [9.0, 27.0]}),
    )
    found = whole_scores([teacher, small], TextFacts(120, 500, bigram_nll=2.0, trigram_nll=1.0))
    entry = found.models["small"]
    assert entry.bits_per_byte == pytest.approx(60 / 120 / np.log(2))
    assert (found.reference_bytes, found.reference_bytes_16bit) == (100, 2000)
    assert entry.compression_x == 20
    assert found.bigram is not None
    assert found.bigram.perplexity == pytest.approx(np.exp(2))
    assert found.bigram.bits_per_byte == pytest.approx(2 / 3 / np.log(2))
    assert "500 training tokens" in found.bigram.text
    assert found.noise_floor is None


def test_scores_tell_the_noise_floor_of_the_reference() -> None:
    sums = {"tokens": 20.0, "nll": 30.0, "kl/self": 0.002, "agree/self": 19.0}
    found = whole_scores([replace(scored(candidate("teacher")), floor=sums)], TextFacts(120, 0)).noise_floor
    assert found is not None
    assert (found.kl_to_reference, found.agreement) == pytest.approx((1e-4, 0.95))
    assert found.cross_entropy == pytest.approx(1.5)


def whole_scores(all_scored: list[Scored], text: TextFacts) -> Scores:
    reference = all_scored[0].candidate.artifact
    return build_scores(
        all_scored, text, split="validation", dtype="float32", rows=1, data=reference, reference=reference
    )
