"""One trial in this process: what it saves, what it does with errors, and GPTQ that cannot solve."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from stages.contract import Artifact
from stages.errors import OutOfMemory
from stages.quantize import trial
from stages.quantize.fidelity import BasePredictions
from stages.quantize.job import SearchJob, Survey
from stages.quantize.records import receipt_name
from stages.quantize.rows import read_rows, split_rows
from stages.quantize.schemes import Scheme
from stages.storage import Folder
from tests.fakes import artifact_of
from tests.stages.quantize.conftest import VOCABULARY, WIDTH

Surveyed = tuple[SearchJob, Survey, BasePredictions]


@pytest.fixture(scope="module")
def surveyed(model: Artifact, data: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Surveyed:
    rows = read_rows(data.paths("tokens/calibration-*.parquet"))
    calibration, evaluation = split_rows(rows, calibration=16, evaluation=8, seed=0)
    job = SearchJob(
        model=model,
        resume=Folder.at(tmp_path_factory.mktemp("resume")),
        calibration_RT=calibration.ids_RT,
        vocabulary_size=VOCABULARY,
        micro_batch=None,
        device="cpu",
        num_threads=1,
        seed=0,
    )
    return job, *trial.survey_model(job, evaluation)


def test_survey_finds_layers_to_quantize_and_counts_tied_parameters_once(surveyed: Surveyed) -> None:
    _, survey, _ = surveyed
    assert len(survey.layers.in_features) == 2 * 7
    assert survey.layers.in_features["model.layers.1.mlp.down_proj"] == 2 * WIDTH
    assert survey.layers.ignored == ("lm_head",)
    assert survey.num_parameters == survey.layers.num_weights + 256 * WIDTH + 5 * WIDTH


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(weight_bits=3, group_size=32, symmetric=False, algorithm="gptq", observer="imatrix_mse"),
        Scheme(weight_bits=8, activation_bits=8, smooth=0.5),
        Scheme(weight_bits=4, group_size=64, observer="memoryless_mse"),
    ],
    ids=lambda scheme: scheme.name,
)
def test_trial_leaves_a_receipt_and_a_checkpoint_with_the_same_kl(
    scheme: Scheme, surveyed: Surveyed, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    job, survey, reference = surveyed
    job = replace(job, resume=Folder.at(tmp_path))
    record = trial.run_trial(scheme, job, survey, reference)
    assert record["status"] == "done", record["error"]
    assert job.resume.get_json(receipt_name(scheme.name)) == record
    assert abs(record["linear_bits_per_weight"] - scheme.weight_bits) < 2.2
    checkpoint = artifact_of("search", tmp_path / record["folder"])
    published = replace(
        checkpoint, files=tuple(replace(f, name=f"finalists/{scheme.name}/{f.name}") for f in checkpoint.files)
    )
    again = trial.remeasure([scheme.name], published, job, survey, reference)
    assert again[scheme.name] == pytest.approx(record["kl"], abs=1e-5)
    assert capfd.readouterr() == ("", "")


def test_trial_whose_gptq_would_round_to_nearest_fails_with_that_reason(surveyed: Surveyed, tmp_path: Path) -> None:
    """One row of one repeated token: every layer's Hessian has rank one."""
    job, survey, reference = surveyed
    job = replace(job, resume=Folder.at(tmp_path), calibration_RT=np.full((1, 32), 7, np.int32))
    scheme = Scheme(weight_bits=4, group_size=32, algorithm="gptq", dampening=1e-12)
    record = trial.run_trial(scheme, job, survey, reference)
    assert record["status"] == "failed"
    assert "could not factorize the Hessian of model.layers.0" in record["error"]
    assert job.resume.get_json(receipt_name(scheme.name)) == record
    assert [entry.name for entry in job.resume.entries()] == [receipt_name(scheme.name)]


def test_trial_that_was_first_elsewhere_returns_that_receipt(surveyed: Surveyed, tmp_path: Path) -> None:
    job, survey, reference = surveyed
    job, scheme = replace(job, resume=Folder.at(tmp_path)), Scheme(weight_bits=8)
    job.resume.put_json(receipt_name(scheme.name), {"status": "failed", "error": "elsewhere"})
    assert trial.run_trial(scheme, job, survey, reference)["error"] == "elsewhere"


@pytest.mark.parametrize("micro_batch", [8, 1])
def test_trial_out_of_memory_leaves_no_receipt_since_another_machine_may_have_more(
    micro_batch: int, surveyed: Surveyed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:126] DefaultCPUAllocator: can't allocate memory: 8 bytes")

    monkeypatch.setattr(trial, "quantize_model", refuse)
    job, survey, reference = surveyed
    job, scheme = replace(job, resume=Folder.at(tmp_path)), Scheme(weight_bits=8)
    survey = replace(survey, micro_batch=micro_batch)
    with pytest.raises(OutOfMemory, match=f"int8-channel-sym-rtn ran out of memory with micro_batch={micro_batch}"):
        trial.run_trial(scheme, job, survey, reference)
    assert not job.resume.entries()


def test_remeasure_of_a_checkpoint_without_weights_gives_the_reason(surveyed: Surveyed, tmp_path: Path) -> None:
    job, survey, reference = surveyed
    folder = tmp_path / "finalists/broken"
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes(next(f for f in job.model.paths("model/config.json")).read_bytes())
    found = trial.remeasure(["broken"], artifact_of("search", tmp_path), job, survey, reference)
    assert isinstance(found["broken"], str)
    assert "safetensors" in found["broken"]


def test_model_without_linear_layers_fits_no_scheme() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    from stages.quantize.compress import find_layers

    model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=2))
    layers = find_layers(model)
    assert layers.in_features == {}
    assert "no linear layers" in str(Scheme(weight_bits=8).misfit(layers.in_features))
