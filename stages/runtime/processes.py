"""What a library changes in our process while it runs there, given back or kept from changing."""

import logging
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from stages.runtime.workarounds import silence_progress_bars


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for a while."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def preserve_signal_handlers() -> Iterator[None]:
    """Give back the signal handlers that a library replaces: Ray's `init` does, Ray Train's `fit`, Tune's too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if signal.getsignal(number) != handler:
                signal.signal(number, handler)


def quiet_data(settings: Any) -> None:
    """Have Ray Data show nothing of its own in this process, and raise what a task raised, not its text.

    Args:
        settings: Ray Data's `DataContext` of this process.
    """
    settings.enable_progress_bars = settings.enable_operator_progress_bars = False
    settings.print_on_execution_start = False
    settings.raise_original_map_exception = True
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    silence_progress_bars()


def quiet_transformers() -> None:
    """Keep transformers' progress bars and warnings off stderr: what matters is raised as an error."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
