"""One trial in this process: what it saves, what it does with errors, and GPTQ that cannot solve."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from stages.contract import Artifact
from stages.errors import OutOfMemory, StageFailed
from stages.formats.dataset import DatasetInfo
from stages.formats.search import DoneTrial, FailedTrial
from stages.models.checkpoints import StoredTensor, load_model, stored_tensors
from stages.models.segments import row_inputs
from stages.quantize import trial
from stages.quantize.compress import find_layers, quantize_model, quiet
from stages.quantize.fidelity import BasePredictions
from stages.quantize.fitting import plan_layers
from stages.quantize.job import SearchJob, Survey
from stages.quantize.records import Receipt, failed_receipt, read_receipt, write_receipt
from stages.quantize.rows import read_distinct_rows, split_rows
from stages.quantize.schemes import CAST, LayerRule, Scheme
from stages.storage import Folder
from tests.fakes import artifact_of
from tests.stages.quantize.conftest import VOCABULARY, WIDTH, save_tiny_model, tiny_tokenizer

Surveyed = tuple[SearchJob, Survey, BasePredictions]


@pytest.fixture(scope="module")
def surveyed(model: Artifact, data: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Surveyed:
    return survey_of(model, data, tmp_path_factory.mktemp("resume"))


def survey_of(model: Artifact, data: Artifact, resume: Path) -> Surveyed:
    rows = read_distinct_rows(data.paths("tokens/calibration-*.parquet"))
    calibration, evaluation = split_rows(rows, calibration_tokens=16 * 32, evaluation_tokens=8 * 31, seed=0)
    job = SearchJob(
        model=model,
        resume=Folder.at(resume),
        calibration=calibration,
        dataset=DatasetInfo.read(data),
        micro_batch=None,
        device="cpu",
        seed=0,
    )
    return job, *trial.survey_model(job, evaluation)


def test_survey_finds_layers_to_quantize_and_counts_tied_parameters_once(surveyed: Surveyed) -> None:
    _, survey, _ = surveyed
    assert len(survey.layers.in_features) == 2 * 7
    assert survey.layers.in_features["model.layers.1.mlp.down_proj"] == 2 * WIDTH
    assert survey.layers.ignored == ("lm_head",)
    assert survey.num_parameters == survey.layers.num_weights + 256 * WIDTH + 5 * WIDTH
    assert survey.layers.vocabulary == ("model.embed_tokens", "lm_head")
    assert (survey.dtype, survey.is_cast, survey.bytes_16) == ("bfloat16", False, 2 * survey.num_parameters)
    assert survey.noise < 1e-9, "float32"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocabulary_size": VOCABULARY + 1}, "the vocabulary of the model has 256 entries, expected at least"),
        ({"tokenizer_digest": "0" * 64}, "the model has another tokenizer"),
    ],
)
def test_survey_of_a_model_that_does_not_fit_the_dataset_is_refused(
    surveyed: Surveyed, change: dict[str, object], message: str
) -> None:
    job, _, base = surveyed
    with pytest.raises(StageFailed, match=message):
        trial.survey_model(replace(job, dataset=job.dataset.model_copy(update=change)), base.rows)


def test_calibration_on_packed_rows_is_that_on_each_document_alone(model: Artifact) -> None:
    """By the weights that GPTQ finds, which depend on every activation: other attention gives others."""
    generator = torch.Generator().manual_seed(0)
    ids_RT = torch.randint(0, VOCABULARY, (8, 32), generator=generator)
    places_RT = torch.cat([torch.arange(12), torch.arange(14), torch.arange(6)]).expand(8, -1)
    scheme, filled_RT = (
        Scheme(weight_bits=4, group_size=32, algorithm="gptq"),
        torch.ones_like(ids_RT, dtype=torch.bool),
    )
    found = []
    for inputs in (
        row_inputs(ids_RT, places_RT, filled_RT, whole=True, batch_rows=4),
        row_inputs(ids_RT, places_RT, filled_RT, whole=False, batch_rows=4),
        [{"input_ids": ids_BT} for ids_BT in ids_RT.split(4)],
    ):
        loaded = load_model(model.folder("model"))
        layers = find_layers(loaded)
        with quiet():
            plan = plan_layers(scheme, layers.in_features)
            quantize_model(loaded, scheme, plan, layers=layers, calibration=inputs)
        found.append(torch.cat([loaded.get_submodule(name).weight.flatten() for name in layers.in_features]))
    packed, alone, mixed = found
    assert float((packed != alone).float().mean()) < 0.001
    assert float((mixed != alone).float().mean()) > 0.02


def as_finalist(receipt: Receipt, resume: Path) -> Artifact:
    assert receipt.folder is not None
    checkpoint = artifact_of("search", resume / receipt.folder)
    name = f"finalists/{receipt.trial.scheme}"
    return replace(checkpoint, files=tuple(replace(f, name=f"{name}/{f.name}") for f in checkpoint.files))


@pytest.mark.parametrize(
    "scheme",
    [
        CAST,
        Scheme(weight_bits=3, group_size=32, symmetric=False, algorithm="gptq", observer="imatrix_mse"),
        Scheme(weight_bits=8, activation_bits=8, smooth=0.5),
        Scheme(weight_bits=4, group_size=64, algorithm="awq"),
        Scheme(weight_bits=4, group_size=64, algorithm="gptq", vocabulary_bits=8, kv_cache="fp8"),
        Scheme(weight_bits=8, numbers="fp8", activation_bits=8),
        Scheme(weight_bits=4, numbers="nvfp4", activation_bits=4),
        Scheme(weight_bits=4, numbers="mxfp4"),
    ],
    ids=lambda scheme: scheme.name,
)
def test_trial_leaves_a_receipt_and_a_checkpoint_with_the_same_kl(
    scheme: Scheme, surveyed: Surveyed, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    job, survey, base = surveyed
    job = replace(job, resume=Folder.at(tmp_path))
    receipt = trial.run_trial(scheme, job, survey, base)
    done = receipt.trial
    assert isinstance(done, DoneTrial), done
    assert read_receipt(job.resume, scheme.name) == receipt
    assert done.config == scheme.model_dump(mode="json")
    assert scheme.weight_bits <= done.linear_bits_per_weight < scheme.weight_bits + 1.1
    again = trial.remeasure([scheme.name], as_finalist(receipt, tmp_path), job, survey, base)
    assert again[scheme.name] == pytest.approx(done.kl, abs=1e-5)
    assert capfd.readouterr() == ("", "")
    wide = {name: found for name, found in stored(receipt, tmp_path).items() if found.dtype == "F32"}
    assert all(name.endswith("global_scale") for name in wide), "the rest and scales are in 16 bits or less"


def stored(receipt: Receipt, resume: Path) -> dict[str, StoredTensor]:
    return stored_tensors(resume / str(receipt.folder))


def test_quantized_vocabulary_of_tied_embeddings_stays_one_table(surveyed: Surveyed, tmp_path: Path) -> None:
    job, survey, base = surveyed
    job = replace(job, resume=Folder.at(tmp_path))
    kept, shrunk = (
        trial.run_trial(Scheme(weight_bits=8, vocabulary_bits=bits), job, survey, base) for bits in (None, 8)
    )
    assert isinstance(kept.trial, DoneTrial)
    assert isinstance(shrunk.trial, DoneTrial), shrunk.trial
    tensors = stored(shrunk, tmp_path)
    assert tensors["model.embed_tokens.weight"].dtype == "I8"
    assert "lm_head.weight" not in tensors
    saved = VOCABULARY * WIDTH - 2 * 2 * VOCABULARY  # of each weight a byte, against scales in bfloat16 for both sides
    assert kept.trial.size_bytes - shrunk.trial.size_bytes == pytest.approx(saved, abs=400)  # the header


def test_scheme_whose_layers_the_library_left_dense_fails_with_their_names(
    surveyed: Surveyed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """compressed-tensors packs `torch.nn.Linear` itself; where it meets a subclass first, it leaves all as they are."""
    import torch

    class Own(torch.nn.Linear):
        pass

    def with_own_layer(model: Any) -> None:
        model.model.layers[0].self_attn.q_proj.__class__ = Own

    monkeypatch.setattr(trial, "split_experts", with_own_layer)
    job, survey, base = surveyed
    receipt = trial.run_trial(Scheme(weight_bits=4), replace(job, resume=Folder.at(tmp_path)), survey, base)
    assert isinstance(receipt.trial, FailedTrial)
    assert "14 parts are not stored as int4-channel-sym-rtn says: " in receipt.trial.error
    assert "model.layers.0.self_attn.q_proj (BF16, 16 bits a weight)" in receipt.trial.error


def test_layer_that_a_group_does_not_divide_is_kept_and_on_record(data: Artifact, tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model", intermediate_size=96)
    job, survey, base = survey_of(artifact_of("model", tmp_path), data, tmp_path / "resume")
    receipt = trial.run_trial(Scheme(weight_bits=4, group_size=64), job, survey, base)
    assert isinstance(receipt.trial, DoneTrial), receipt.trial
    assert receipt.trial.kept_layers == tuple(f"model.layers.{layer}.mlp.down_proj" for layer in (0, 1))
    tensors = stored(receipt, tmp_path / "resume")
    assert tensors["model.layers.0.mlp.down_proj.weight"].dtype == "BF16"
    in_kept, weights = 2 * 96 * WIDTH, survey.layers.num_weights
    expected = (16 * in_kept + 4.25 * (weights - in_kept)) / weights
    assert receipt.trial.linear_bits_per_weight == pytest.approx(expected, abs=0.1)  # 16 bytes of shape a layer


@pytest.mark.parametrize("family", ["Qwen3Moe", "Mixtral"])
def test_bits_of_mixture_models_count_their_experts(family: str, data: Artifact, tmp_path: Path) -> None:
    """Qwen's experts are quantized; Mixtral's stay in 16 bits, since transformers loads them by other names."""
    import torch
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64}
    experts = (
        {"num_local_experts": 4}
        if family == "Mixtral"
        else {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    )
    config = getattr(transformers, f"{family}Config")(**sizes, **heads, **experts)
    getattr(transformers, f"{family}ForCausalLM")(config).bfloat16().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    job, survey, base = survey_of(artifact_of("model", tmp_path), data, tmp_path / "resume")
    in_experts = 4 * 3 * WIDTH * 32
    assert survey.layers.num_weights == in_experts + 2 * WIDTH * (64 + 32)
    assert survey.is_cast
    names = [name for name in survey.layers.in_features if "experts" in name]
    assert len(names) == (12 if family == "Qwen3Moe" else 0)
    receipt = trial.run_trial(Scheme(weight_bits=4, group_size=32), job, survey, base)
    if family == "Mixtral":
        assert survey.layers.num_expert_weights == in_experts
        assert isinstance(receipt.trial, FailedTrial)
        assert "mlp.experts.down_proj" in receipt.trial.error
        assert "plain transformers does not load what was written: the weights in its folder" in receipt.trial.error
    else:
        assert isinstance(receipt.trial, DoneTrial), receipt.trial
        assert 4.5 <= receipt.trial.linear_bits_per_weight < 4.7


@pytest.mark.parametrize("algorithm", ["rtn", "gptq"])
def test_rule_of_a_scheme_changes_the_bits_of_its_layer_only(
    algorithm: str, surveyed: Surveyed, tmp_path: Path
) -> None:
    """By llm-compressor, on disk, and after plain transformers loaded the files."""
    job, survey, base = surveyed
    job = replace(job, resume=Folder.at(tmp_path))
    layer, skipped = "model.layers.1.mlp.down_proj", "model.layers.0.mlp.gate_proj"
    rules = (LayerRule(layers=layer, weight_bits=8, group_size=64), LayerRule(layers=skipped, skip=True))
    scheme = Scheme.model_validate({"weight_bits": 4, "group_size": 32, "algorithm": algorithm, "rules": rules})
    receipt = trial.run_trial(scheme, job, survey, base)
    done = receipt.trial
    assert isinstance(done, DoneTrial), done
    again = trial.remeasure([scheme.name], as_finalist(receipt, tmp_path), job, survey, base)
    assert again[scheme.name] == pytest.approx(done.kl, abs=1e-5)
    found = {name: shape_on_disk(tmp_path / str(receipt.folder), name) for name in survey.layers.in_features}
    widths = survey.layers.in_features
    # Packed columns of int32 for each input, and the columns of scales.
    expected = {name: (width * 4 // 32, width // 32) for name, width in widths.items()}
    assert found == expected | {layer: (widths[layer] * 8 // 32, widths[layer] // 64), skipped: (widths[skipped], 0)}


def shape_on_disk(folder: Path, layer: str) -> tuple[int, int]:
    """Return a layer's columns of stored weights, and of scales."""
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
        if f"{layer}.weight" in names:
            return file.get_slice(f"{layer}.weight").get_shape()[1], 0
        return tuple(file.get_slice(f"{layer}.{part}").get_shape()[1] for part in ("weight_packed", "weight_scale"))


def test_trial_whose_gptq_would_round_to_nearest_fails_with_that_reason(surveyed: Surveyed, tmp_path: Path) -> None:
    """One row of one repeated token: every layer's Hessian has rank one."""
    job, survey, base = surveyed
    row = job.calibration.take(np.array([0]))
    job = replace(job, resume=Folder.at(tmp_path), calibration=replace(row, ids_RT=np.full((1, 32), 7, np.int32)))
    scheme = Scheme(weight_bits=4, group_size=32, algorithm="gptq", dampening=1e-12)
    receipt = trial.run_trial(scheme, job, survey, base)
    assert isinstance(receipt.trial, FailedTrial)
    assert "could not factorize the Hessian of model.layers.0" in receipt.trial.error
    assert read_receipt(job.resume, scheme.name) == receipt
    assert [entry.name for entry in job.resume.entries()] == [f"trials/{scheme.name}.json"]


def test_trial_that_was_first_elsewhere_returns_that_receipt(surveyed: Surveyed, tmp_path: Path) -> None:
    job, survey, base = surveyed
    job, scheme = replace(job, resume=Folder.at(tmp_path)), Scheme(weight_bits=8)
    first = write_receipt(job.resume, failed_receipt(scheme, "elsewhere", 0.0))
    assert trial.run_trial(scheme, job, survey, base) == first


@pytest.mark.parametrize("micro_batch", [8, 1])
def test_trial_out_of_memory_leaves_no_receipt_since_another_machine_may_have_more(
    micro_batch: int, surveyed: Surveyed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:126] DefaultCPUAllocator: can't allocate memory: 8 bytes")

    monkeypatch.setattr(trial, "quantize_model", refuse)
    job, survey, base = surveyed
    job, scheme = replace(job, resume=Folder.at(tmp_path)), Scheme(weight_bits=8)
    survey = replace(survey, micro_batch=micro_batch)
    with pytest.raises(OutOfMemory, match=f"int8-channel-sym-rtn ran out of memory with micro_batch={micro_batch}"):
        trial.run_trial(scheme, job, survey, base)
    assert not job.resume.entries()


def test_remeasure_of_a_checkpoint_without_weights_gives_the_reason(surveyed: Surveyed, tmp_path: Path) -> None:
    job, survey, base = surveyed
    folder = tmp_path / "finalists/broken"
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes(next(f for f in job.model.paths("model/config.json")).read_bytes())
    found = trial.remeasure(["broken"], artifact_of("search", tmp_path), job, survey, base)
    assert isinstance(found["broken"], str)
    assert "safetensors" in found["broken"]


def test_model_of_conv1d_has_no_linear_layers_but_a_vocabulary() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    from stages.quantize.compress import find_layers

    model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=2))
    layers = find_layers(model)
    assert layers.in_features == {}
    assert layers.vocabulary == ("transformer.wte", "lm_head")
