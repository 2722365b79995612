"""The real vLLM: loads what the rules say it serves, writes the text that transformers writes, refuses the rest."""

import os
import subprocess
import sys

import pytest

from stages.candidates import read_candidates
from stages.errors import ExternalDataError
from stages.formats.speed import CandidateSpeed
from stages.measure.device import describe_cpu
from stages.measure.runtimes import VLLM
from stages.measure.stage import Measure
from stages.measure.vllm_runs import measure_in_vllm
from stages.models.serving import served_by
from stages.runtime.vllm_environment import locate
from stages.runtime.workers import WorkerSetup
from tests.fakes import RecordingReporter, artifact_of
from tests.stages.measure.quantize_tiny import VERSIONS

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]
NAMES = ("plain", *VERSIONS)


@pytest.fixture(scope="module")
def candidates(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    command = [sys.executable, "-m", "tests.stages.measure.quantize_tiny", str(folder)]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    return read_candidates({name: artifact_of("model", folder / name) for name in NAMES})


@pytest.fixture(scope="module")
def measured(candidates) -> dict[str, CandidateSpeed]:
    try:
        locate(None, None, "cpu")
    except ExternalDataError as error:
        pytest.skip(str(error))
    config = Measure(
        runtime=VLLM(device="cpu"), device=describe_cpu(), threads=2, prompt_tokens=48, new_tokens=16, warmup=1,
        repeats=3, throughput_batch_sizes=(4,), throughput_repeats=1,
    )  # fmt: skip
    setup = WorkerSetup(RecordingReporter(), 2, "cpu")
    return measure_in_vllm(config, VLLM(device="cpu"), candidates, setup, {})


@pytest.mark.parametrize("name", ["plain", "int4-g128", "int4-g32"])
def test_checkpoint_is_loaded_writes_the_text_of_transformers_and_is_timed(measured, name):
    found = measured[name]
    assert (found.served, found.reason, found.dtype, found.runtime) == (True, None, "bfloat16", "vllm-cpu")
    assert found.same_text.holds, found.same_text.text
    assert found.same_text.tokens == 4 * 16
    assert 0 < found.prefill_p50_ms <= found.prefill_p95_ms
    assert 0 < found.latency_p50_ms <= found.latency_p95_ms
    assert list(found.by_batch) == ["1", "4"]
    assert found.peak_memory_bytes > 0


def test_four_bits_take_less_memory_than_sixteen(measured):
    assert measured["int4-g128"].peak_memory_bytes < measured["plain"].peak_memory_bytes


def test_three_bits_are_refused_as_the_rule_says(measured, candidates):
    found = measured["int3-g32"]
    assert (found.served, found.figures) == (False, {})
    assert "Failed to find a kernel that can implement the WNA16 linear layer" in found.reason
    rules = {candidate.name: served_by(candidate.config)["vllm-cpu"].answer for candidate in candidates}
    assert rules == {"plain": "served", "int4-g128": "served", "int4-g32": "served", "int3-g32": "refused"}
