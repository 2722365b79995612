"""What Ray gives stages no public way to do: each here alone, with its reason and the version that it was seen in.

`tests/stages/runtime/test_ray_workarounds.py` fails when Ray moves past that version or a name vanishes; each of these
can go where the reason that it gives has gone.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

RAY_VERSION = "2.60"
"""Of Ray, that the reasons below were seen in (2026-11-21)."""
TRAIN_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",  # the end of training is noticed at the next check; 2 s by default
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # one actor less to start; a lost worker is the engine's to handle
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # prints appear twice else
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
}
"""Settings of Ray Train that exist as environment variables only."""


def trainer_class() -> Any:
    """Return Ray Train's trainer without two of its callbacks, which cost time and give nothing here.

    Its placement-group cleaner asks Ray's dashboard whether the controller lives; where there is none, each question
    waits for 10 s and so does the end of training (12 s of a 27 s fit). The engine removes what a lost attempt leaves.
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


@contextmanager
def deprecated_options() -> Iterator[None]:
    """Let Ray Data be told not to retry: it deprecates every way to pass `max_retries` and `max_restarts`.

    It names none in their place, and by default it tries again itself, which is the engine's to do.
    """
    from ray.util.annotations import RayDeprecationWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RayDeprecationWarning)
        yield
