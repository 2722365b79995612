"""Measure on real tiny models through Ray."""

import json
import shutil
from importlib.metadata import version

import pytest
from transformers import GPT2Config, GPT2LMHeadModel, MambaConfig, MambaForCausalLM

from stages.contract import Artifact
from stages.errors import StageFailed
from stages.formats.speed import Speed
from stages.measure.device import describe_cpu
from stages.measure.stage import NO_KERNEL, Measure
from tests.fakes import artifact_of, fake_context
from tests.stages.evaluate.tiny import make_model, make_search, save_model

pytestmark = pytest.mark.ray

SMALL = {
    **{"device": describe_cpu(), "threads": 1, "prompt_tokens": 8, "new_tokens": 4, "warmup": 1, "repeats": 3},
    **{"throughput_batch_sizes": (2,), "throughput_repeats": 1},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Artifact]:
    """Two models, and a search whose finalist says in its config that it is quantized."""
    root = tmp_path_factory.mktemp("models")
    wide = make_model(root / "wide", seed=0, width=128, layers=3)
    narrow = make_model(root / "narrow", seed=1)
    finalist = root / "search" / "finalists" / "w8"
    save_model(finalist, seed=0)
    config = json.loads((finalist / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors", "config_groups": {}}
    (finalist / "config.json").write_text(json.dumps(config))
    return {"wide": wide, "narrow": narrow, "search": make_search(root / "search", narrow, ("w8",))}


def read_speed(context) -> Speed:
    return Speed.parse(context.out.get("speed.json"), where="speed.json")


def test_speed_of_models_is_measured_and_that_of_quantized_ones_is_not(models, tmp_path, local_ray):
    context = fake_context(tmp_path, {"models": models})
    outcome = Measure(**SMALL).run(context)
    speed = read_speed(context)

    assert speed.model_dump(exclude={"models"}) == {
        "runtime": f"transformers {version('transformers')}",
        "dtype": "stored",
        "throughput_batch_sizes": (2,),
        "device": describe_cpu(),
        "threads": 1,
        "batch_size": 1,
        "prompt_tokens": 8,
        "new_tokens": 4,
        "repeats": 3,
    }
    assert list(speed.models) == ["narrow", "narrow.w8", "wide"]
    for name in ("wide", "narrow"):
        entry = speed.models[name]
        assert 0 < entry.prefill_p50_ms <= entry.prefill_p95_ms
        assert 0 < entry.latency_p50_ms <= entry.latency_p95_ms
        whole_ms = entry.prefill_p95_ms + 3 * entry.latency_p95_ms
        assert entry.tokens_per_second >= 4 / whole_ms * 1000 * 0.5
        assert entry.reason is None
        assert (entry.dtype, entry.runtime, entry.served) == ("float32", "transformers", True)
        assert list(entry.by_batch) == ["1", "2"]
        assert entry.throughput_tokens_per_second == entry.by_batch["2"]
        assert outcome.metrics[f"latency_p50_ms/{name}"] == entry.latency_p50_ms
    quantized = speed.models["narrow.w8"]
    assert quantized.reason == NO_KERNEL
    assert quantized.figures == {}


def test_memory_counts_the_weights_and_what_a_run_allocates(models, tmp_path, local_ray):
    context = fake_context(tmp_path, {"models": {"wide": models["wide"]}})
    Measure(**{**SMALL, "repeats": 2}).run(context)
    peak = read_speed(context).models["wide"].peak_memory_bytes
    weights = sum(file.size_bytes for file in models["wide"].below("model/*.safetensors"))
    assert weights < peak < 3 * weights


def test_more_threads_than_cpus_are_refused(models, tmp_path):
    with pytest.raises(StageFailed, match="threads=4, but the step takes cpus_per_worker=1"):
        Measure(**{**SMALL, "threads": 4}).run(fake_context(tmp_path, {"models": models}))


def test_worker_on_another_device_is_refused(models, tmp_path, local_ray):
    config = Measure(**{**SMALL, "device": "NVIDIA H100 80GB HBM3"})
    with pytest.raises(StageFailed, match="NVIDIA H100 80GB HBM3") as caught:
        config.run(fake_context(tmp_path, {"models": {"wide": models["wide"]}}))
    assert describe_cpu() in str(caught.value)


def test_what_one_model_lacks_is_said_in_its_place_and_the_others_are_measured(models, tmp_path, local_ray):
    for name, model in (
        ("old", GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=10, n_embd=16, n_layer=1, n_head=2))),
        ("mamba", MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=1))),
    ):
        model.save_pretrained(tmp_path / name / "model")
    shutil.copytree(tmp_path / "mamba", tmp_path / "broken")
    (tmp_path / "broken" / "model" / "model.safetensors").write_bytes(b"not a tensor")
    others = {name: artifact_of("model", tmp_path / name) for name in ("old", "mamba", "broken")}
    context = fake_context(tmp_path / "run", {"models": {"wide": models["wide"], **others}})
    Measure(**SMALL).run(context)
    found = read_speed(context).models
    assert "'old' reads 10 tokens at most, prompt_tokens + new_tokens = 12" in found["old"].reason
    assert "cannot load the model" in found["broken"].reason
    for name in ("wide", "mamba"):
        assert found[name].reason is None
        assert found[name].latency_p50_ms > 0
    assert [note.partition(":")[0] for note in context.reporter.notes] == ["old", "broken"]


def test_prompt_longer_than_the_context_of_rotary_positions_is_measured(models, tmp_path, local_ray):
    config = Measure(**{**SMALL, "prompt_tokens": 126, "repeats": 2})
    outcome = config.run(fake_context(tmp_path, {"models": {"narrow": models["narrow"]}}))
    assert outcome.metrics["prefill_p50_ms/narrow"] > 0


def test_model_given_from_outside_that_is_quantized_is_not_measured(tmp_path, local_ray):
    save_model(tmp_path / "given" / "model", seed=0)
    path = tmp_path / "given" / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": {"quant_method": "gptq"}}))
    context = fake_context(tmp_path / "run", {"models": {"given": artifact_of("model", tmp_path / "given")}})
    outcome = Measure(**SMALL).run(context)
    assert read_speed(context).models["given"].reason == NO_KERNEL
    assert outcome.metrics == {}
