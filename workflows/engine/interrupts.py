"""Ctrl-C and SIGTERM: the first asks the run to stop, the second leaves at once."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED_EXIT_CODE = 130


@contextmanager
def interruptible(say: Callable[[], None]) -> Iterator[threading.Event]:
    """Yield a flag that the first signal sets; the handlers that were there before come back at the end.

    Libraries install their own handlers (Ray Train and Tune do, and leave them): ours are set again by nothing, since
    those libraries run in workers, never in this process.
    """
    flag = threading.Event()

    def handle(signum: int, frame: FrameType | None) -> None:
        if flag.is_set():
            os._exit(INTERRUPTED_EXIT_CODE)
        flag.set()
        say()

    signals = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {signum: signal.signal(signum, handle) for signum in signals}
    try:
        yield flag
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
