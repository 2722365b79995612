"""What `compress` refuses or works out before it has a graph: the tokens of a row, by the checkpoints' configs."""

import json
from pathlib import Path

import pytest

from stages.errors import ConfigError
from stages.measure.stage import Measure
from stages.models.serving import RuntimeChoice
from stages.prepare.stage import Prepare
from stages.promote.stage import Gate
from workflows.compress import DataSettings, HardwareSettings, StudentSpec, compress
from workflows.quickstart import quickstart


def checkpoint(folder: Path, **config: int) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def row_length(teacher: str, *others: str, sequence_length: int | None = None) -> int:
    students = [StudentSpec(name=f"other{i}", checkpoint=other) for i, other in enumerate(others)]
    flow = compress(
        teacher=teacher,
        documents=("a.txt",),
        students=(StudentSpec(name="half", layers=2), *students),
        data=DataSettings(sequence_length=sequence_length),
        hardware=HardwareSettings(device="a CPU"),
    )
    stage = flow.steps["corpus"].stage
    assert isinstance(stage, Prepare)
    return stage.sequence_length


def test_row_has_what_teacher_and_students_can_read_and_no_more_than_2048_tokens(tmp_path: Path) -> None:
    gpt2, long, mamba = (
        checkpoint(tmp_path / "gpt2", n_positions=256),
        checkpoint(tmp_path / "long", max_position_embeddings=32_768),
        checkpoint(tmp_path / "mamba"),
    )
    assert row_length(long) == row_length(mamba) == row_length("nowhere/at-all/there") == 2048
    assert row_length(gpt2) == row_length(long, gpt2) == row_length(mamba, gpt2, long) == 256
    assert row_length(gpt2, sequence_length=128) == 128


def test_row_longer_than_a_checkpoint_can_read_is_refused_before_anything_runs(tmp_path: Path) -> None:
    gpt2, long = checkpoint(tmp_path / "gpt2", n_positions=256), checkpoint(tmp_path / "long", n_positions=4096)
    with pytest.raises(ConfigError, match=r"sequence_length is 512, and teacher \(.*\) reads at most 256 tokens"):
        row_length(gpt2, sequence_length=512)
    with pytest.raises(ConfigError, match=r"512, and other0 \(.*\) reads at most 256 tokens; set it to 256"):
        row_length(long, gpt2, sequence_length=512)


def test_similarity_of_near_duplicates_is_the_one_that_is_asked_for() -> None:
    hardware, data = HardwareSettings(device="a CPU"), DataSettings(duplicate_similarity=0.95)
    stage = compress(teacher="a/b", documents=("a.txt",), data=data, hardware=hardware).steps["corpus"].stage
    assert isinstance(stage, Prepare)
    assert stage.duplicate_similarity == 0.95


def test_texts_to_train_on_and_to_compare_on_that_are_the_same_are_refused(tmp_path: Path) -> None:
    for name in ("one.txt", "copy.txt", "other.txt"):
        (tmp_path / name).write_text("other" if name == "other.txt" else "one")
    teacher, hardware = checkpoint(tmp_path / "teacher"), HardwareSettings(device="a CPU")
    documents = (str(tmp_path / "one.txt"),)

    def graph(held_out: str) -> None:
        compress(teacher=teacher, documents=documents, evaluation=(str(tmp_path / held_out),), hardware=hardware)

    graph("other.txt")
    with pytest.raises(ConfigError, match=r"copy.txt' is among the texts to compare models on, and '.*one.txt', which"):
        graph("copy.txt")


@pytest.mark.parametrize("cpus", [0.5, 1.0, 2.5])
def test_step_that_measures_takes_a_cpu_for_each_of_its_threads(tmp_path: Path, cpus: float) -> None:
    teacher = checkpoint(tmp_path / "gpt2", n_positions=256)
    hardware = HardwareSettings(device="a CPU", cpus_per_worker=cpus)
    step = compress(teacher=teacher, documents=("a.txt",), hardware=hardware).steps["speed"]
    assert isinstance(step.stage, Measure)
    assert step.stage.threads == max(1, int(cpus))
    assert step.stage.threads <= step.resources.cpus_per_worker == max(1.0, cpus)


@pytest.mark.parametrize(("runtime", "gpus"), [("vllm-cuda", 0.0), ("vllm-cpu", 1.0)])
def test_runtime_for_another_device_is_refused_before_anything_runs(
    tmp_path: Path, runtime: RuntimeChoice, gpus: float
) -> None:
    teacher = checkpoint(tmp_path / "gpt2", n_positions=256)
    hardware = HardwareSettings(device="a device", gpus_per_worker=gpus)
    with pytest.raises(ConfigError, match=f"'{runtime}', but speed is measured on"):
        compress(teacher=teacher, documents=("a.txt",), gate=Gate(runtime=runtime), hardware=hardware)
    if not gpus:
        with pytest.raises(ConfigError, match="'vllm-cuda', but speed is measured on CPUs"):
            quickstart(gate=Gate(runtime=runtime))
