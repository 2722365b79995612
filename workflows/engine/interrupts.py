"""Ctrl-C and SIGTERM: the first asks the run to stop, the second leaves at once."""

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import psutil

from workflows.engine.tracking.tracker import PUBLISHER

INTERRUPTED_EXIT_CODE = 130
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def _leave_at_once() -> None:
    """End this process and a Ray started here, which would leave its agents behind; the publisher goes on."""
    try:
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                if PUBLISHER not in child.cmdline():
                    child.kill()
    finally:
        os._exit(INTERRUPTED_EXIT_CODE)


@contextmanager
def interruptible(say: Callable[[], None]) -> Iterator[threading.Event]:
    """Yield a flag that the first signal sets; the handlers that were there before come back at the end.

    A thread counts the signals, by the descriptor that Python writes each to as it comes: a handler would have to wait
    until the main thread is back from C, and Ray's shutdown is there for seconds. Handlers that a library installs
    meanwhile must be given back (`stages.runtime.processes.preserve_signal_handlers`).
    """
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return

    def watch() -> None:
        while signum := arrivals.recv(1):
            if signum[0] not in SIGNALS:
                continue
            if flag.is_set():
                _leave_at_once()
            flag.set()
            threading.Thread(target=say, daemon=True).start()  # a terminal that is gone must not stop the counting

    arrivals, written = socket.socketpair()
    written.setblocking(False)
    before = {signum: signal.signal(signum, lambda *_: None) for signum in SIGNALS}
    old = signal.set_wakeup_fd(written.fileno(), warn_on_full_buffer=False)
    watcher = threading.Thread(target=watch, name="interrupts", daemon=True)
    watcher.start()
    try:
        yield flag
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(old)
        written.close()  # ends the thread
        watcher.join()
        arrivals.close()
