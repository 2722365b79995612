"""The quickstart for vLLM: its finalists are what vLLM serves, and its champion was loaded there."""

import json
from pathlib import Path

import pytest

from stages.errors import ExternalDataError
from stages.formats.report import Report
from stages.formats.speed import Speed
from stages.runtime.vllm_environment import locate
from tests.workflows.run_command import finish, short_quickstart, start

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1200)]

LIMITS = {"min_compression_x": 0.1, "runtime": "vllm"} | dict.fromkeys(
    ("max_kl_to_base", "min_agreement_with_base", "max_perplexity_increase_fraction", "max_perplexity_ratio_to_teacher")
)


def read(store: Path, name: str) -> bytes:
    (path,) = (store / "artifacts").glob(f"*/out/*/{name}")
    return path.read_bytes()


def test_champion_of_a_quickstart_for_vllm_was_loaded_by_vllm(tmp_path: Path) -> None:
    try:
        locate(None, None, "cpu")
    except ExternalDataError as error:
        pytest.skip(str(error))
    command = ["run", *short_quickstart(), "--gate", json.dumps(LIMITS), "--store", str(tmp_path / "store"), "--json"]
    finish(start(*command, cwd=tmp_path), timeout_seconds=1100)
    speed = Speed.parse(read(tmp_path / "store", "speed.json"), where="speed.json")
    assert speed.runtime == "vllm 0.32.0 on cpu"
    report = Report.parse(read(tmp_path / "store", "report.json"), where="report.json")
    # Of 8, 4 and 3 bits, 4 alone are served by vLLM on a CPU: the others are no finalists.
    quantized = {name: found.served for name, found in speed.models.items() if "." in name}
    assert quantized
    assert set(quantized.values()) == {True}
    champion = report.verdict.champion
    assert champion is not None
    measured = speed.models[champion]
    assert (measured.served, measured.runtime, measured.reason) == (True, "vllm-cpu", None)
    assert measured.latency_p50_ms is not None
    (check,) = (check for check in report.verdict.checks[champion] if check.limit == "runtime")
    assert "(seen; measured)" in check.text
