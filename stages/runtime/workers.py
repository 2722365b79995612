"""The processes that do a stage's work: what they take from Ray, what they do first, how their errors come back.

Promises: a task of `remote_task` reports that it has started before anything else, so that a healthy step is never
ended as one that waits for resources; what `fetch_result` or `translated_errors` lets out is an error of ours.
Does not: import ray or torch before it is called; retry, which is the engine's.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Self

from stages.contract import Context, Reporter, Resources
from stages.runtime.translation import translate

__all__ = [
    "ComputeDtype",
    "RemoteTask",
    "WorkerSetup",
    "compute_dtype",
    "device_of",
    "fetch_result",
    "num_threads",
    "remote_task",
    "train_resources",
    "translated_errors",
    "tune_resources",
    "worker_options",
]


def worker_options(resources: Resources) -> dict[str, float]:
    """Return what one worker takes, as Ray's tasks, actors and Ray Data's operators are asked for it."""
    return _requested(resources, "num_cpus", "num_gpus")


def tune_resources(resources: Resources) -> dict[str, float]:
    """Return what one trial takes, as Ray Tune is asked for it."""
    return _requested(resources, "cpu", "gpu")


def train_resources(resources: Resources) -> dict[str, float]:
    """Return what one rank takes, as Ray Train is asked for it."""
    return _requested(resources, "CPU", "GPU")


def _requested(resources: Resources, cpus: str, gpus: str) -> dict[str, float]:
    requested: dict[str, float] = {cpus: resources.cpus_per_worker, gpus: resources.gpus_per_worker}
    if resources.memory_bytes_per_worker is not None:
        requested["memory"] = resources.memory_bytes_per_worker
    return requested


def device_of(resources: Resources) -> Literal["cpu", "cuda"]:
    """Return the kind of device that a worker computes on."""
    return "cuda" if resources.gpus_per_worker > 0 else "cpu"


ComputeDtype = Literal["float32", "bfloat16"]
"""What models compute in; losses, statistics and weights that are trained are float32 whatever it is."""


def compute_dtype(resources: Resources, asked: ComputeDtype | None = None) -> ComputeDtype:
    """Return what models compute in where nothing else is asked: bfloat16 on GPUs, float32 on CPUs.

    It belongs in a stage's config, since results depend on it; so a workflow asks for it here as it makes its stages.
    """
    return asked or ("bfloat16" if device_of(resources) == "cuda" else "float32")


def num_threads(resources: Resources) -> int:
    """Return how many threads of torch a worker computes with."""
    return max(1, int(resources.cpus_per_worker))


@dataclass(frozen=True, slots=True)
class WorkerSetup:
    """What a worker of a step must know before it works; picklable."""

    reporter: Reporter
    num_threads: int
    device: Literal["cpu", "cuda"]

    @classmethod
    def of(cls, context: Context) -> Self:
        """Return the setup of the workers of a step."""
        return cls(context.reporter, num_threads(context.resources), device_of(context.resources))

    def begin(self, *, uses_torch: bool = True) -> None:
        """Report that the work has its resources, and set torch's threads.

        Args:
            uses_torch: whether torch is imported and set up; work without it starts a second sooner.
        """
        self.reporter.started()
        if uses_torch:
            import torch

            torch.set_num_threads(self.num_threads)
            if self.device == "cuda":  # where float32 is asked for: products of TF32, which most of a GPU is made for
                torch.backends.cuda.matmul.allow_tf32 = True
                torch.backends.cudnn.allow_tf32 = True


@dataclass(frozen=True, slots=True)
class RemoteTask:
    """A function as a Ray task whose worker begins the step's work first."""

    function: Callable[..., Any]
    setup: WorkerSetup
    task: Any
    """Ray's remote function, which calls `setup.begin()` and then the function."""

    def remote(self, *args: Any, **kwargs: Any) -> Any:
        """Submit the task; return its reference, several with `num_returns`, or its stream of references."""
        return self.task.remote(self.setup, self.function, *args, **kwargs)


def remote_task(
    function: Callable[..., Any],
    context: Context,
    *,
    fresh_process: bool = False,
    num_returns: int | Literal["streaming"] = 1,
    setup: WorkerSetup | None = None,
) -> RemoteTask:
    """Return a function as a Ray task with the resources of one worker; it is never retried by Ray.

    Args:
        function: what the worker calls, after `WorkerSetup.begin`; a generator function with `streaming`.
        context: of the step.
        fresh_process: whether the worker's process ends with the task, since a library leaves state behind.
        num_returns: how many references a call gives.
        setup: what the worker begins with, where it is not the context's.
    """
    import ray

    options: dict[str, Any] = {"max_retries": 0, "num_returns": num_returns, **worker_options(context.resources)}
    if fresh_process:
        options["max_calls"] = 1
    call = _begin_and_iterate if num_returns == "streaming" else _begin_and_call
    task = ray.remote(**options)(call).options(name=function.__name__)
    return RemoteTask(function, setup or WorkerSetup.of(context), task)


def _begin_and_call(setup: WorkerSetup, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    setup.begin()
    return function(*args, **kwargs)


def _begin_and_iterate(
    setup: WorkerSetup, function: Callable[..., Iterator[Any]], *args: Any, **kwargs: Any
) -> Iterator[Any]:
    """Do the same with a generator function: Ray streams from those only."""
    setup.begin()
    yield from function(*args, **kwargs)


def fetch_result(ref: Any) -> Any:
    """Return what a reference refers to, or the results of a list of references.

    Raises:
        StillhouseError: the task failed; what it raised, translated.
    """
    import ray

    with translated_errors():
        return ray.get(ref)


@contextmanager
def translated_errors(*also: type[Exception]) -> Iterator[None]:
    """Raise an error of ours where Ray raises one of its own, or one of the types given.

    Args:
        also: further types, such as Ray Train's, which are none of `RayError`.
    """
    from ray.exceptions import RayError

    try:
        yield
    except (RayError, *also) as error:
        raise translate(error) from error
