"""What one model lacks when speed is measured is its own matter, whatever it raises."""

import json
from pathlib import Path

import pytest

from stages.candidates import read_candidates
from stages.errors import Transient
from stages.formats.speed import CandidateSpeed
from stages.measure import stage as measure_stage
from stages.measure.device import describe_cpu
from stages.measure.stage import Measure, measure
from stages.runtime.workers import WorkerSetup
from tests.fakes import RecordingReporter, artifact_of
from tests.stages.evaluate.tiny import save_model

CONFIG = Measure(
    device=describe_cpu(), threads=1, prompt_tokens=8, new_tokens=4, warmup=0, repeats=2, throughput_batch_sizes=()
)


def measured(folder: Path) -> dict[str, CandidateSpeed]:
    for name in ("plain", "strange"):
        save_model(folder / name / "model", seed=0)
    candidates = read_candidates({name: artifact_of("model", folder / name) for name in ("plain", "strange")})
    return measure(CONFIG, candidates, WorkerSetup(RecordingReporter(), 1, "cpu"))[0]


def test_error_of_any_type_is_that_models_reason(tmp_path, monkeypatch):
    load = measure_stage._load

    def load_strangely(config, candidate, device):
        return load(config, candidate, device) if candidate.name == "plain" else [][1]

    monkeypatch.setattr(measure_stage, "_load", load_strangely)
    found = measured(tmp_path)
    assert found["plain"].latency_p50_ms > 0
    assert found["strange"].reason == "it could not be measured: IndexError: list index out of range"


def test_checkpoint_that_is_out_of_reach_is_no_reason_but_tried_again(tmp_path, monkeypatch):
    def unreachable(*_):
        raise Transient("the store is out of reach")

    monkeypatch.setattr(measure_stage, "_load", unreachable)
    with pytest.raises(Transient, match="out of reach"):
        measured(tmp_path)


@pytest.mark.parametrize("written", [{"n_ctx": 10}, {"llm_config": {"max_seq_len": 10}}])
def test_context_is_read_wherever_a_family_writes_it(tmp_path, written):
    save_model(tmp_path / "odd" / "model", seed=0)
    path = tmp_path / "odd" / "model" / "config.json"
    path.write_text(json.dumps({"architectures": ["Odd"], **written}))
    candidates = read_candidates({"odd": artifact_of("model", tmp_path / "odd")})
    found, _ = measure(CONFIG, candidates, WorkerSetup(RecordingReporter(), 1, "cpu"))
    assert "'odd' reads 10 tokens at most, prompt_tokens + new_tokens = 12" in found["odd"].reason
