"""What is timed and in which order, what is made of it, and what memory is counted."""

import subprocess
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from stages.measure import device
from stages.measure.generation import Load, Timings, generate, measure_memory, summarize, time_interleaved


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, eos_token_id=5
    )
    return LlamaForCausalLM(config).eval()


def recording(model, calls: list, name: str):
    """A model that notes its name and the shapes of its inputs."""

    def forward(input_ids, past_key_values, **options):
        calls.append((name, tuple(input_ids.shape), past_key_values.get_seq_length() if past_key_values else 0))
        return model(input_ids=input_ids, past_key_values=past_key_values, **options)

    class Recording:
        config = model.config
        device = model.device
        __call__ = staticmethod(forward)

    return Recording()


def test_generation_prefills_once_then_decodes_one_token_at_a_time_with_the_cache(model):
    calls: list = []
    load = Load(batch_size=2, prompt_tokens=6, new_tokens=4)
    timings = generate(recording(model, calls, "a"), load.prompt(64, seed=0, device="cpu"), 4)
    assert calls == [("a", (2, 6), 0), ("a", (2, 1), 6), ("a", (2, 1), 7), ("a", (2, 1), 8)]
    assert len(timings.step_seconds) == 3
    assert min(timings.prefill_seconds, *timings.step_seconds) > 0


@pytest.mark.parametrize("cache", ["cache_params", None])
def test_generation_uses_the_cache_that_a_family_has_or_reads_all_anew(cache):
    """State space models call theirs otherwise; without one each step reads the whole text."""
    lengths = []

    def read(input_ids, given):
        lengths.append((input_ids.shape[1], given))
        logits = torch.zeros(*input_ids.shape, 4)
        return SimpleNamespace(logits=logits, **({cache: "state"} if cache else {}))

    def with_state(input_ids, cache_params=None, use_cache=None):
        assert use_cache is True
        return read(input_ids, cache_params)

    def without(input_ids, logits_to_keep=0):
        return read(input_ids, None)

    generate(with_state if cache else without, torch.zeros(1, 5, dtype=torch.long), 3)
    assert lengths == ([(5, None), (1, "state"), (1, "state")] if cache else [(5, None), (6, None), (7, None)])


def test_models_are_interleaved_and_warmups_are_not_recorded(model):
    calls: list = []
    rounds: list = []
    models = {name: recording(model, calls, name) for name in "ABC"}
    found, failed = time_interleaved(
        models, Load(1, 3, 2), warmup=1, repeats=2, seed=0, progress=lambda done, total: rounds.append((done, total))
    )
    prefills = [name for name, shape, _ in calls if shape == (1, 3)]
    assert prefills == ["A", "B", "C"] * 3
    assert {name: len(runs) for name, runs in found.items()} == {"A": 2, "B": 2, "C": 2}
    assert rounds == [(1, 3), (2, 3), (3, 3)]
    assert failed == {}


def test_model_that_fails_while_it_is_timed_costs_the_others_nothing(model):
    odd = recording(model, [], "B")
    type(odd).__call__ = lambda self, input_ids: {}["no such key"]
    models = {"A": recording(model, [], "A"), "B": odd}
    found, failed = time_interleaved(models, Load(1, 3, 2), warmup=0, repeats=2, seed=0, progress=lambda *_: None)
    assert {name: len(runs) for name, runs in found.items()} == {"A": 2}
    assert failed == {"B": "KeyError: 'no such key'"}


def test_summary_takes_percentiles_over_runs_and_over_all_steps():
    runs = [Timings(0.010 + 0.001 * i, (0.002, 0.004)) for i in range(5)]
    found = summarize(runs, Load(batch_size=8, prompt_tokens=1, new_tokens=3))
    assert found["prefill_p50_ms"] == pytest.approx(12)
    assert found["prefill_p95_ms"] == pytest.approx(13.8)
    assert found["latency_p50_ms"] == pytest.approx(3)
    assert found["latency_p95_ms"] == pytest.approx(4)
    assert found["tokens_per_second"] == pytest.approx(8 * 3 / 0.018)


def test_memory_is_repeatable_and_grows_with_the_batch_by_at_least_its_cache(model):
    weights = sum(parameter.nbytes for parameter in model.parameters())
    one = measure_memory(model, Load(1, 32, 4), seed=0)
    again = measure_memory(model, Load(1, 32, 4), seed=1)
    eight = measure_memory(model, Load(8, 32, 4), seed=0)
    cache_bytes = 2 * 2 * 32 * 35 * 4  # keys and values, layers, width, tokens, float32
    assert one == again
    assert one > weights + cache_bytes
    assert eight - one > 7 * cache_bytes


def test_device_is_the_gpu_where_nvidia_smi_names_one(monkeypatch):
    monkeypatch.setattr(device.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(device.subprocess, "run", lambda *a, **k: SimpleNamespace(stdout="NVIDIA H200\nNVIDIA H200\n"))
    assert device.describe_gpu() == "NVIDIA H200"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert device.describe_gpu() is None


def test_device_is_the_cpu_where_nvidia_smi_fails(monkeypatch):
    def fail(*arguments, **options):
        raise subprocess.CalledProcessError(9, "nvidia-smi")

    monkeypatch.setattr(device.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(device.subprocess, "run", fail)
    assert device.describe_gpu() is None
    assert device.describe_cpu()
