from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from stages.contract import Resources
from stages.errors import StageFailed
from stages.runtime.workers import (
    WorkerSetup,
    compute_dtype,
    device_of,
    fetch_result,
    num_threads,
    remote_task,
    train_resources,
    tune_resources,
    worker_options,
)
from tests.fakes import RecordingReporter, fake_context


class FileReporter(RecordingReporter):
    """Remembers in a file that the work has started, for whoever asks in another process."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def started(self) -> None:
        self.path.touch()


@pytest.mark.parametrize(
    ("requested", "names"),
    [
        (worker_options, ("num_cpus", "num_gpus")),
        (tune_resources, ("cpu", "gpu")),
        (train_resources, ("CPU", "GPU")),
    ],
)
def test_resources_asks_each_library_in_its_own_names(requested: object, names: tuple[str, str]) -> None:
    assert callable(requested)
    cpus, gpus = names
    assert requested(Resources(cpus_per_worker=2)) == {cpus: 2, gpus: 0}
    wanted = Resources(cpus_per_worker=0.5, gpus_per_worker=1, memory_bytes_per_worker=10)
    assert requested(wanted) == {cpus: 0.5, gpus: 1, "memory": 10}


def test_device_and_threads_follow_resources() -> None:
    assert device_of(Resources()) == "cpu"
    assert device_of(Resources(gpus_per_worker=0.25)) == "cuda"
    assert num_threads(Resources(cpus_per_worker=3.5)) == 3
    assert num_threads(Resources(cpus_per_worker=0.5)) == 1


def test_worker_setup_begins_by_reporting_and_setting_threads(tmp_path: Path) -> None:
    context = fake_context(tmp_path, cpus_per_worker=2)
    before = torch.get_num_threads()
    try:
        WorkerSetup.of(context).begin()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert isinstance(context.reporter, RecordingReporter)
    assert context.reporter.has_begun


def test_worker_setup_on_a_gpu_computes_float32_products_in_tf32(tmp_path: Path) -> None:
    flags = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [flag.allow_tf32 for flag in flags]
    try:
        for gpus, expected in ((0, False), (1, True)):
            for flag in flags:
                flag.allow_tf32 = False
            context = fake_context(tmp_path, cpus_per_worker=torch.get_num_threads(), gpus_per_worker=gpus)
            WorkerSetup.of(context).begin()
            assert [flag.allow_tf32 for flag in flags] == [expected, expected]
    finally:
        for flag, value in zip(flags, before, strict=True):
            flag.allow_tf32 = value


def test_compute_dtype_follows_the_device_unless_asked() -> None:
    assert compute_dtype(Resources()) == "float32"
    assert compute_dtype(Resources(gpus_per_worker=0.5)) == "bfloat16"
    assert compute_dtype(Resources(gpus_per_worker=1), "float32") == "float32"


def _started_and_threads(path: Path) -> tuple[bool, int]:
    return path.exists(), torch.get_num_threads()


def _count(path: Path) -> Iterator[bool]:
    yield path.exists()
    yield path.exists()


def _fail() -> None:
    raise StageFailed("the weights are broken")


@pytest.mark.ray
def test_remote_task_starts_the_work_before_its_function(tmp_path: Path, local_ray: None) -> None:
    import ray

    path = tmp_path / "started"
    context = fake_context(tmp_path, cpus_per_worker=1)
    object.__setattr__(context, "reporter", FileReporter(path))
    assert fetch_result(remote_task(_started_and_threads, context, fresh_process=True).remote(path)) == (True, 1)
    path.unlink()
    stream = remote_task(_count, context, num_returns="streaming").remote(path)
    assert [ray.get(ref) for ref in stream] == [True, True]
    with pytest.raises(StageFailed, match=r"^the weights are broken$"):
        fetch_result(remote_task(_fail, context).remote())
