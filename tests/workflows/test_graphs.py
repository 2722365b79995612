"""Workflows as graphs: what models compute in, and how often the quickstart's students are trained."""

from typing import Any

import pytest

from stages.promote.stage import Gate
from workflows.compress import HardwareSettings, StudentSpec, compress
from workflows.quickstart import quickstart


def dtypes_of(flow: Any) -> dict[str, str]:
    """Return the dtype of every stage that has one, by step."""
    stages = {name: step.stage for name, step in flow.steps.items()}
    return {name: stage.dtype for name, stage in stages.items() if "dtype" in type(stage).model_fields}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "float32"),
        ({"gpus_per_worker": 1.0, "device": "NVIDIA H200"}, "bfloat16"),
        ({"gpus_per_worker": 1.0, "device": "NVIDIA H200", "dtype": "float32"}, "float32"),
        ({"dtype": "bfloat16"}, "bfloat16"),
    ],
    ids=["cpu", "gpu", "gpu as asked", "cpu as asked"],
)
def test_every_stage_of_compress_computes_in_what_suits_the_device(options: dict[str, Any], expected: str) -> None:
    students = (StudentSpec(name="half", layers=2),)
    hardware = HardwareSettings(**options)
    found = dtypes_of(compress(teacher="teacher", documents=("texts",), students=students, hardware=hardware))
    assert found.pop("speed") == "stored"
    assert {"signals", "train.half", "scores"} <= found.keys()
    assert set(found.values()) == {expected}


def test_every_stage_of_the_quickstart_computes_in_float32_on_the_cpu() -> None:
    assert set(dtypes_of(quickstart()).values()) == {"float32", "stored"}


def trainings(flow: Any) -> dict[str, Any]:
    return {name: step.stage for name, step in flow.steps.items() if name.startswith("train.")}


def test_quickstart_of_three_seeds_trains_each_student_three_times_and_keeps_what_one_seed_trained() -> None:
    one, three = trainings(quickstart(seed=5)), trainings(quickstart(seed=5, seeds=3))
    assert {name: three[name] for name in one} == one
    for student in ("plain", "distilled"):
        names = [f"train.{student}", f"train.{student}-seed6", f"train.{student}-seed7"]
        assert [three[name].seed for name in names] == [5, 6, 7]
        assert len({three[name].model_copy(update={"seed": 0}).model_dump_json() for name in names}) == 1
    flow = quickstart(seed=5, seeds=3)
    assert set(trainings(flow)) <= flow.upstream("scores")
    assert [name for name in flow.steps if name.startswith("quantize.")] == ["quantize.distilled"]


def test_quickstarts_students_are_trained_as_long_as_their_teacher_by_the_same_recipe() -> None:
    flow = quickstart()
    teacher, plain = flow.steps["teacher"].stage, flow.steps["train.plain"].stage
    assert plain.model_copy(update={"model": teacher.model}) == teacher


def test_limits_of_the_gate_change_no_search_and_no_scores() -> None:
    """Who sets a limit once the figures are there, as `unjudged` asks, has only the verdict made anew."""

    def stages(gate: Gate) -> dict[str, Any]:
        flow = compress(teacher="teacher", documents=("texts",), gate=gate, hardware=HardwareSettings(device="a CPU"))
        return {name: step.stage for name, step in flow.steps.items() if name != "verdict"}

    assert stages(Gate()) == stages(Gate(max_kl_to_base=0.01, min_compression_x=2.0))
