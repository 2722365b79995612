"""What Ray, torch, transformers and llm-compressor give no public way to do: each here alone, with its reason.

`tests/stages/runtime/test_workarounds.py` fails when one of their versions or of these names changes: then look whether
the reason still holds, and delete what has none.
"""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from stages.errors import ConfigError

logger = logging.getLogger(__name__)

SEEN_IN = {"ray": "2.60", "torch": "2.13", "transformers": "5.17", "llmcompressor": "0.14"}
"""Package → how the version begins in which all of this was seen."""
TRAIN_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",  # the end of training is noticed at the next check; 2 s by default
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # one actor less to start; a lost worker is the engine's to handle
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # prints appear twice else
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
}
"""Settings of Ray Train that exist as environment variables only."""
MAX_SOCKET_PATH_BYTES = 103 if sys.platform == "darwin" else 107
"""What the kernel takes as the path of a socket, and Ray checks."""
SESSION = "/session_2026-11-25_00-00-00_000000_4194304/sockets/plasma_store"
"""What Ray appends to its folder, at its longest."""


# The engine's ---------------------------------------------------------------------------------------------------------


def silence_ray_stdout() -> None:
    """Send what raylets print through this driver to its log: `log_to_driver=False` still lets it through."""
    from ray._private import worker

    worker.print_to_stdstream = lambda data, ignore_prefix: logger.info("%s", "\n".join(map(str, data["lines"])))


@contextlib.contextmanager
def apart_from_the_user() -> Iterator[None]:
    """Start or join a Ray inside whose processes neither share this one's process group nor its current folder.

    A SIGTERM to the group (Slurm, systemd, `kill -- -PID`) would end the raylet at once, so that no step is stopped in
    order, and Ray's client ends this process 60 s later with exit code 1.
    Ray puts the driver's current folder (`os.path.curdir`, as an absolute path) first on every worker's import path, so
    that a folder `datasets/` of the user's stands in for the library. Workers get the folder that holds stillhouse.
    """
    from ray._private import services

    popen, folder = services.ConsolePopen, os.path.curdir
    services.ConsolePopen, os.path.curdir = partial(popen, process_group=0), str(Path(__file__).parents[2])
    try:
        yield
    finally:
        services.ConsolePopen, os.path.curdir = popen, folder


def remove_orphaned_groups() -> None:
    """Remove this run's placement groups whose creator died: Ray keeps what they reserve until the job ends.

    Ray Train's controller and Tune make them inside a step's process. Ray Train has a cleaner of its own for them,
    which the train stage switches off: it asks Ray's dashboard whether its controller lives, and where there is none,
    as in a Ray started here, each question and so the end of each training waits for 10 s (12 s of a 27 s fit); nor
    does it know of Tune's. The public table of placement groups does not name the creator.
    """
    import ray
    from ray._private.state import state
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData as Group
    from ray.util.placement_group import PlacementGroup

    for raw in state._connect_and_get_accessor().get_placement_group_table():
        group = Group.FromString(raw)
        if (
            group.creator_actor_dead  # also of those that no actor made
            and group.creator_actor_id != ray.ActorID.nil().binary()
            and not group.is_detached
            and group.state != Group.REMOVED
            and group.ray_namespace == ray.get_runtime_context().namespace
        ):
            handle = PlacementGroup(ray.PlacementGroupID(group.placement_group_id))
            ray.util.remove_placement_group(handle)
            logger.info("deciding to remove placement group %s, since what made it died", handle.id.hex())


@contextlib.contextmanager
def killing_workers_left_behind(*, local: bool) -> Iterator[None]:
    """Shut a Ray down inside; a worker of one that was started here hangs at its exit now and then, for ever."""
    workers = []
    with contextlib.suppress(psutil.Error):
        children = psutil.Process().children() if local else []
        raylets = [child for child in children if child.name() == "raylet"]
        workers = [worker for raylet in raylets for worker in raylet.children(recursive=True)]
    yield
    for worker in workers:
        with contextlib.suppress(psutil.Error):
            worker.kill()


def short_temp_dir(environ: Mapping[str, str]) -> str | None:
    """Return a folder for Ray's sockets where its own, below a long `TMPDIR`, makes paths that no socket may have.

    Raises:
        ConfigError: no folder is short enough and writable.
    """
    usual = environ.get("RAY_TMPDIR") or environ.get("TMPDIR") or "/tmp"
    if _fits(f"{usual}/ray"):
        return None
    for folder in (environ.get("XDG_RUNTIME_DIR"), "/tmp", "/var/tmp"):
        if folder and _fits(short := f"{folder}/ray-{os.getuid()}") and os.access(folder, os.W_OK):
            logger.info("deciding to put Ray's files below %s, since paths below %s are too long", short, usual)
            return short
    raise ConfigError(
        f"Ray cannot put its sockets below {usual!r}: their paths would have "
        f"{len(os.fsencode(f'{usual}/ray{SESSION}'))} bytes, and a socket's may have {MAX_SOCKET_PATH_BYTES}; set "
        "RAY_TMPDIR to a short folder that can be written, such as /tmp"
    )


def _fits(folder: str) -> bool:
    return len(os.fsencode(str(Path(folder)) + SESSION)) <= MAX_SOCKET_PATH_BYTES


# The stages' ---------------------------------------------------------------------------------------------------------


def trainer_class() -> Any:
    """Return Ray Train's trainer without two of its callbacks, which cost time and give nothing here.

    Its placement-group cleaner's work is done by `remove_orphaned_groups`, for the reasons given there.
    The datasets' callback starts an actor that imports Ray Data (1.3 s); the reader is ours.
    """
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

    class Trainer(TorchTrainer):  # type: ignore[misc]  # the base is untyped
        def _create_default_callbacks(self) -> list[Any]:
            unwanted = (DatasetsCallback, PlacementGroupCleanerCallback)
            return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, unwanted)]

    return Trainer


@contextlib.contextmanager
def deprecated_options() -> Iterator[None]:
    """Silence Ray Data where `max_retries` or `max_restarts` is passed: it deprecates every way to do so.

    It names none in their place, and by default it retries itself, which is the engine's to do.
    """
    from ray.util.annotations import RayDeprecationWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RayDeprecationWarning)
        yield


def silence_progress_bars() -> None:
    """Silence Ray Data's progress bars in this process: switched off, they warn at each execution that they are off."""
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)


def allocations(profiler: Any) -> list[int]:
    """Return the bytes of each allocation, and less than 0 of each release, in the order in which they happened.

    torch's public tables attribute memory to operators; only the profiler's raw events keep allocations in order.

    Args:
        profiler: a `torch.profiler.profile` that has ended, with `profile_memory`.
    """
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def rounded_to_nearest(gptq: Any) -> list[str]:
    """Return the modules that an llm-compressor `GPTQModifier` rounded to nearest; it says so in its log only."""
    return list(gptq._rtn_fallback_module_names)


def num_scaled_by_awq(awq: Any) -> int:
    """Return how many layers an llm-compressor `AWQModifier` found to scale; it goes on where there are none."""
    return len(awq._resolved_mappings)


def unpinned_cache() -> None:
    """Let llm-compressor's AWQ run where there is no accelerator: it pins its cache whether or not there is one."""
    import torch
    from llmcompressor.pipelines.cache import IntermediatesCache

    if not torch.accelerator.is_available():
        IntermediatesCache.pin_memory = lambda *_, **__: None


def linearized_experts(model: Any) -> None:
    """Give each expert of a mixture model linear layers of its own, in place, where plain transformers loads them back.

    transformers keeps the experts of a layer in one tensor. llm-compressor splits it, and writes `gate_proj`, `up_proj`
    and `down_proj` of each expert; transformers reads these for families whose checkpoints have such names (Qwen, not
    Mixtral, whose experts load as noise). Its own way to load them split needs torchvision.
    """
    from transformers import conversion_mapping

    # For the families with other names, experts stay one tensor in 16 bits.
    found = conversion_mapping.get_checkpoint_conversion_mapping(model.config.get_text_config().model_type) or []
    sources = [pattern for rule in found for pattern in getattr(rule, "source_patterns", ())]
    if any("experts" in pattern and "gate_proj" in pattern for pattern in sources):
        from llmcompressor.modeling.moe.linearize import linearize_moe

        linearize_moe(model)
