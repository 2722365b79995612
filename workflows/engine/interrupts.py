"""Ctrl-C and SIGTERM: the first asks the run to stop, the second leaves at once.

A scheduler sends SIGTERM, to all of a job's processes, and kills what is left 30 s later (Slurm's `KillWait`,
Kubernetes' grace period); so after a SIGTERM the process is gone by then, whatever still holds it up.
"""

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import psutil

from workflows.engine.tracking.tracker import PUBLISHER

SIGNALS = (signal.SIGINT, signal.SIGTERM)
TERMINATION_SECONDS = 20.0
"""How long a run may take to stop after a SIGTERM."""


class Interrupt(threading.Event):
    """Set by the first signal."""

    signum: int = signal.SIGINT

    @property
    def exit_code(self) -> int:
        """What a process returns that the signal ended: 130 or 143."""
        return 128 + self.signum


def _leave_at_once(exit_code: int) -> None:
    """End this process and a Ray started here, which would leave its agents behind; the publisher goes on."""
    try:
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                if PUBLISHER not in child.cmdline():
                    child.kill()
    finally:
        os._exit(exit_code)


def _leave_in_time() -> None:
    """Leave before a scheduler kills what is left; what is committed stands, and claims of the dead are free."""
    with suppress(OSError):
        os.write(sys.stderr.fileno(), b"stopped; run the same command again to go on\n")
    _leave_at_once(128 + signal.SIGTERM)


@contextmanager
def interruptible(say: Callable[[], None]) -> Iterator[Interrupt]:
    """Yield a flag that the first signal sets; the handlers that were there before come back at the end.

    A thread counts the signals, by the descriptor that Python writes each to as it comes: a handler would have to wait
    until the main thread is back from C, and Ray's shutdown is there for seconds. Handlers that a library installs
    meanwhile must be given back (`stages.runtime.processes.preserve_signal_handlers`).
    """
    flag = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return

    def watch() -> None:
        while signum := arrivals.recv(1):
            if signum[0] not in SIGNALS:
                continue
            if flag.is_set():
                _leave_at_once(128 + signum[0])
            flag.signum = signum[0]
            flag.set()
            if flag.signum == signal.SIGTERM:
                deadline.start()
            threading.Thread(target=say, daemon=True).start()  # a terminal that is gone must not stop the counting

    deadline = threading.Timer(TERMINATION_SECONDS, _leave_in_time)
    deadline.daemon = True
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
        deadline.cancel()
        arrivals.close()
