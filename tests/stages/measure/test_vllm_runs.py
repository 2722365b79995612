"""What is made of vLLM's answers, with a script in its place that answers as it does."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from stages.candidates import read_candidates
from stages.errors import ExternalDataError, StageFailed, Transient
from stages.measure import vllm_runs
from stages.measure.runtimes import VLLM
from stages.measure.stage import Measure
from stages.measure.vllm_runs import measure_in_vllm
from stages.runtime.vllm_environment import InstalledVLLM
from stages.runtime.workers import WorkerSetup
from tests.fakes import RecordingReporter, artifact_of
from tests.stages.evaluate.tiny import save_model

SCRIPT = """
import json, os, sys
failing = 0
for line in sys.stdin:
    request = json.loads(line)
    call, given = request["call"], request["arguments"]
    answer = {"id": request["id"]}
    if call == "load" and "refused" in given["model"]:
        print("what vLLM printed", file=sys.stderr, flush=True)
        answer["error"] = {"kind": "failed", "message": "ValueError: Failed to find a kernel"}
    elif call == "load" and "large" in given["model"]:
        print("the last words", file=sys.stderr, flush=True)
        answer["error"] = {"kind": "memory", "message": "OutOfMemoryError: too large"}
    elif call == "load" and "crashing" in given["model"]:
        os.abort()
    elif call == "load" and "slow" in given["model"]:
        continue
    elif call == "load" and "unlucky" in given["model"] and not os.path.exists(given["model"] + "/tried"):
        open(given["model"] + "/tried", "w").close()
        os.abort()
    elif call == "generate" and failing and len(given["prompts"]) == failing:
        answer["error"] = {"kind": "memory", "message": "OutOfMemoryError: 5 are too many"}
    elif call == "memory" and failing:
        os.abort()
    elif call == "load":
        failing = 5 if "narrow" in given["model"] else 0
        assert (given["dtype"], given["context"], given["batch_size"], given["eager"]) == ("auto", 12, 5, True)
        answer["result"] = {"dtype": "bfloat16", "weights_bytes": 10}
    elif call == "generate":
        num = len(given["prompts"])
        tokens = [[1] * given["new_tokens"]] * num
        answer["result"] = {"tokens": tokens, "first_seconds": [0.004] * num, "step_seconds": [0.002, 0.002, 0.004]}
    elif call == "memory":
        answer["result"] = {"cache_bytes": 1_000_000, "peak_bytes": 500_000}
    print(json.dumps(answer), flush=True)
"""
CONFIG = Measure(
    runtime=VLLM(device="cpu", version="0.32.0"), device="a CPU", threads=1, prompt_tokens=8, new_tokens=4, warmup=0,
    repeats=2, throughput_batch_sizes=(5,), throughput_repeats=1,
)  # fmt: skip


@pytest.fixture
def vllm(tmp_path, monkeypatch) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    monkeypatch.setattr(vllm_runs, "SCRIPT", tmp_path / "script.py")
    monkeypatch.setattr(vllm_runs, "locate", lambda *_: InstalledVLLM("0.32.0", "cpu", sys.executable))


def measure(folder: Path, *names: str, runtime=CONFIG.runtime):
    for name in names:
        save_model(folder / name / "model", seed=0)
    candidates = read_candidates({name: artifact_of("model", folder / name) for name in names})
    logs: dict[str, list[str]] = {}
    setup = WorkerSetup(RecordingReporter(), 1, "cpu")
    return measure_in_vllm(CONFIG, runtime, candidates, setup, logs), logs


def test_answers_become_figures_and_another_text_is_found(tmp_path, vllm):
    found, logs = measure(tmp_path, "good")
    speed = found["good"]
    assert (speed.served, speed.reason, speed.dtype, logs) == (True, None, "bfloat16", {})
    assert (speed.prefill_p50_ms, speed.latency_p50_ms) == (pytest.approx(4), pytest.approx(2))
    assert speed.by_batch == {"1": pytest.approx(4 / 0.012), "5": pytest.approx(20 / 0.012)}
    assert speed.throughput_tokens_per_second == speed.by_batch["5"]
    stored = sum(file.size_bytes for file in artifact_of("model", tmp_path / "good").below("*.safetensors"))
    # Weights that its kernels hold elsewhere count as they are stored, at the width that is computed in.
    assert 1_500_000 + stored / 2 - 20_000 < speed.peak_memory_bytes < 1_500_000 + stored / 2
    assert (speed.same_text.tokens, speed.same_text.holds) == (16, False)


def test_each_candidate_that_fails_says_why_and_the_others_are_measured(tmp_path, vllm):
    found, logs = measure(tmp_path, "refused", "large", "good")
    assert {name: speed.served for name, speed in found.items()} == {"refused": False, "large": None, "good": True}
    assert "vLLM 0.32.0 on a CPU does not serve it: ValueError: Failed to find a kernel" in found["refused"].reason
    assert "has no memory for it: OutOfMemoryError" in found["large"].reason
    assert logs == {"refused": ["what vLLM printed"], "large": ["the last words"]}
    assert found["good"].figures


def test_process_that_is_lost_is_started_once_more_and_is_no_verdict(tmp_path, vllm, monkeypatch):
    found, logs = measure(tmp_path, "crashing", "unlucky")
    assert (found["crashing"].served, found["crashing"].figures) == (None, {})
    assert "vLLM 0.32.0 on a CPU was lost, twice: its process ended by signal 6 at 'load'" in found["crashing"].reason
    assert (found["unlucky"].served, found["unlucky"].reason) == (True, None)
    assert "crashing" in logs
    monkeypatch.setattr(vllm_runs, "LOAD_SECONDS", 0.3)
    with pytest.raises(Transient, match=r"lost with every model.* did not answer 'load' within"):
        measure(tmp_path / "other", "slow")


def test_figure_that_fails_after_the_first_text_costs_no_other(tmp_path, vllm):
    found, logs = measure(tmp_path, "narrow")
    speed = found["narrow"]
    assert (speed.served, speed.dtype, list(speed.by_batch)) == (True, "bfloat16", ["1"])
    assert speed.latency_p50_ms == pytest.approx(2)
    assert (speed.throughput_tokens_per_second, speed.peak_memory_bytes) == (None, None)
    assert "a batch of 5 was not measured: OutOfMemoryError: 5 are too many" in speed.reason
    assert "its peak memory was not measured: its process ended by signal 6 at 'memory'" in speed.reason
    assert speed.same_text.tokens == 16
    assert "narrow" in logs


def test_checkpoint_that_is_odd_costs_no_other_its_figures(tmp_path, vllm, monkeypatch):
    def odd(folder, *_, **__):
        return {}["no such key"] if "strange" in str(folder) else [[1, 2]]

    monkeypatch.setattr(vllm_runs, "text_prompts", odd)
    monkeypatch.setattr(vllm_runs, "compare_text", odd)
    released: list[str] = []
    monkeypatch.setattr(vllm_runs, "release_memory", lambda: released.append("before the next process starts"))
    found, _ = measure(tmp_path, "strange", "good")
    assert len(released) == 2
    assert (found["strange"].served, found["strange"].reason) == (None, "it was not measured: KeyError: 'no such key'")
    assert found["good"].served


def test_share_of_a_gpu_that_must_be_free_is_what_the_model_needs(tmp_path, monkeypatch):
    save_model(tmp_path, seed=0)
    gib = 1024**3
    card = SimpleNamespace(total_memory=80 * gib)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    stored = (tmp_path / "model.safetensors").stat().st_size
    assert vllm_runs._fraction(tmp_path, "stored", gib) == pytest.approx((stored + 5 * gib) / (80 * gib))
    card.total_memory = gib
    assert vllm_runs._fraction(tmp_path, "stored", gib) == 0.92


def test_runtime_for_another_device_or_that_is_not_here_fails_the_step(tmp_path, monkeypatch):
    with pytest.raises(StageFailed, match="but the step computes on cpu"):
        measure(tmp_path, runtime=VLLM(device="cuda", version="0.32.0"))
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path))
    with pytest.raises(ExternalDataError, match="stillhouse runtimes install vllm --device cpu"):
        measure(tmp_path)
