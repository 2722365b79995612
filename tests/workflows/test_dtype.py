"""What models compute in: by the resources, in every stage's config, unless it is asked otherwise."""

from typing import Any

import pytest

from workflows.compress import StudentSpec, compress
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
    found = dtypes_of(compress(teacher="teacher", documents=("texts",), students=students, **options))
    assert {"signals", "train.half", "scores", "speed"} <= found.keys()
    assert set(found.values()) == {expected}


def test_every_stage_of_the_quickstart_computes_in_float32_on_the_cpu() -> None:
    assert set(dtypes_of(quickstart()).values()) == {"float32"}
