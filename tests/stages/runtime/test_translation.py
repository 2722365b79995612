"""Errors of libraries become errors of ours, with a message of one line."""

import pytest
import torch
from obstore.exceptions import GenericError

from stages.errors import OutOfMemory, StageFailed, Transient, WorkerLost
from stages.runtime.translation import translate, within_memory

REFUSED = (
    "[enforce fail at alloc_cpu.cpp:126] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
)


class RayTaskError(Exception):
    """Shaped like Ray's: its text is a whole traceback, what was raised is its cause."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(f"ray::task()\n  Traceback (most recent call last):\n    …\n{cause!r}")
        self.cause = cause


class WorkerGroupError(Exception):
    """Shaped like Ray Train's."""

    def __init__(self, *failures: Exception) -> None:
        super().__init__("Training failed due to worker errors:\n[Rank 0 Error Snippet]:\n…")
        self.worker_failures = dict(enumerate(failures))


class ControllerError(Exception):
    """Shaped like Ray Train's."""

    def __init__(self, failure: Exception) -> None:
        super().__init__(f"Training failed due to controller error:\n{failure}")
        self.controller_failure = failure


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RayTaskError(StageFailed("the flask broke")), StageFailed("the flask broke")),
        (WorkerGroupError(RuntimeError("peer"), Transient("503")), Transient("503")),
        (RayTaskError(KeyError("rows")), StageFailed("KeyError: 'rows'")),
        (RayTaskError(ValueError("first\nsecond")), StageFailed("ValueError: first")),
        (RayTaskError(ConnectionError("reset")), Transient("ConnectionError: reset")),
        (RayTaskError(MemoryError("4 GB")), OutOfMemory("MemoryError: 4 GB")),
        (RayTaskError(RuntimeError(REFUSED)), OutOfMemory(f"RuntimeError: {REFUSED}")),
        (RayTaskError(StageFailed(f"trial 3 failed: {REFUSED}")), StageFailed(f"trial 3 failed: {REFUSED}")),
        (GenericError("503 Slow Down\nDebug source: …"), Transient("GenericError: 503 Slow Down")),
        (RayTaskError(KeyError("rows\nFailed to apply UDF transform after 1/1")), StageFailed("KeyError: 'rows")),
        (RayTaskError(StageFailed("broke\nFailed to apply UDF transform after 1/1")), StageFailed("broke")),
        (ControllerError(ModuleNotFoundError("No module 'x'")), StageFailed("ModuleNotFoundError: No module 'x'")),
    ],
)
def test_translate_names_what_was_raised_not_the_wrapper(error: Exception, expected: Exception) -> None:
    found = translate(error)
    assert (type(found), found.args) == (type(expected), expected.args)


def test_translate_full_disk_says_so_once_and_what_to_do() -> None:
    inner = RuntimeError("Error while serializing:\nNo space left on device (os error 28)\nDebug source: …")
    found = translate(translate(WorkerGroupError(RayTaskError(inner))))
    assert type(found) is StageFailed
    assert str(found).count("the disk is full (No space left on device (os error 28))") == 1
    assert "stillhouse artifacts gc" in str(found)
    assert "\n" not in str(found)


def test_translate_used_up_quota_says_so() -> None:
    error = RuntimeError("Generic LocalFileSystem error: Unable to copy data\nDisk quota exceeded (os error 122)")
    assert str(translate(error)).startswith("the disk quota is used up (Disk quota exceeded (os error 122)); free")


def test_translate_peers_that_lost_a_rank_is_a_lost_worker() -> None:
    assert type(translate(WorkerGroupError(RuntimeError("[../gloo/transport/tcp/pair.cc] timed out")))) is WorkerLost


def test_translate_error_of_ours_made_from_a_lack_of_memory_is_one() -> None:
    error = StageFailed("the checkpoint cannot be loaded")
    error.__cause__ = MemoryError("4 GB")
    assert type(translate(error)) is OutOfMemory


@pytest.mark.parametrize(
    "refusal", [MemoryError("4 GB"), torch.OutOfMemoryError("CUDA out of memory"), RuntimeError(REFUSED)], ids=type
)
@pytest.mark.parametrize(
    ("micro_batch", "advice", "said"),
    [
        (8, None, r"scoring 'a' ran out of memory with micro_batch=8 \(.+\); set resources.micro_batch below 8$"),
        (1, None, r"scoring 'a' ran out of memory with micro_batch=1 \(.+\); .* use a device with more memory$"),
        (None, "measure fewer", r"scoring 'a' ran out of memory \(.+\); measure fewer$"),
    ],
)
def test_within_memory_refused_says_what_was_done_with_how_many_rows_and_what_to_do(
    refusal: Exception, micro_batch: int | None, advice: str | None, said: str
) -> None:
    with (
        pytest.raises(OutOfMemory, match=said) as caught,
        within_memory("scoring 'a'", micro_batch=micro_batch, advice=advice),
    ):
        raise refusal
    assert caught.value.micro_batch == micro_batch


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2"), StageFailed(f"trial 3: {REFUSED}"), KeyError("rows")])
def test_within_memory_lets_other_errors_through(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, within_memory("scoring 'a'"):
        raise error
    assert caught.value is error
