"""A runtime that lives in an environment of its own, as a process that answers calls: JSON lines over its pipes.

vLLM's pins conflict with llm-compressor's (compressed-tensors 0.17 against 0.19), so that the two can never share a
process or an environment. What runs there is a script of ours that needs nothing but that environment.

Promises: the process and all that it starts end with this object, and with this process however that ends (its input
closes); a call that takes too long ends it; what it writes to standard error goes to the log or, where the log drops it
(as in Ray's tasks, which log from warnings on), to this process's own standard error, and its last lines are kept; its
errors come back as errors of ours, and its loss as one that trying again may fix.
Does not: know what the script can do, or restart it.
"""

import collections
import contextlib
import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from stages.errors import OutOfMemory, StageFailed, Transient, WorkerLost

__all__ = ["ServingProcess"]

logger = logging.getLogger(__name__)

LOG_LINES = 200
"""Last lines of standard error that are kept."""
PRIVATE_PREFIXES = ("RAY_", "PYTHON", "STILLHOUSE_")
"""Variables of ours that mean something else, or nothing, in another environment."""


class ServingProcess:
    """A script that another environment's Python runs."""

    def __init__(self, python: str, script: Path, *, environment: Mapping[str, str]) -> None:
        """Start it.

        Args:
            python: the other environment's interpreter.
            script: reads requests and writes answers; see `vllm_worker.py`.
            environment: variables that are set for it beside this process's own.

        Raises:
            StageFailed: the interpreter cannot be started.
        """
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(PRIVATE_PREFIXES)}
        try:
            self._process = subprocess.Popen(
                [python, "-I", str(script)],  # -I: neither the current folder nor the script's is on its import path
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                env={**inherited, **environment},
                start_new_session=True,  # so that its own processes can be ended with it
            )
        except OSError as error:
            raise StageFailed(f"{python!r} cannot be started: {error}; name the Python of the runtime") from error
        self._answers: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._log: collections.deque[str] = collections.deque(maxlen=LOG_LINES)
        self._num_calls = 0
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._read_answers, self._read_log)]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Self:
        """Return the process, which ends with the block."""
        return self

    def __exit__(self, *exception: object) -> None:
        """End it."""
        self.close()

    @property
    def log(self) -> list[str]:
        """The last lines that it wrote to standard error."""
        return list(self._log)

    def call(self, name: str, *, timeout_seconds: float, **arguments: Any) -> Any:
        """Call a function of the script and return its result, plain JSON.

        Raises:
            OutOfMemory: it ran out of memory.
            WorkerLost: it ended, now or before.
            Transient: it took longer than the time-out, which ends it.
            StageFailed: it says that it failed.
        """
        assert self._process.stdin is not None
        if self._process.stdin.closed:
            raise WorkerLost(f"{name!r} was not asked: its process had ended")
        self._num_calls += 1
        request = {"id": self._num_calls, "call": name, "arguments": arguments}
        with contextlib.suppress(OSError):  # it has ended: the answer says how
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        try:
            answer = self._answers.get(timeout=timeout_seconds)
        except queue.Empty:
            self.close()
            raise Transient(f"it did not answer {name!r} within {timeout_seconds:g} s, and was ended") from None
        if answer is None:
            self.close()
            raise self._ended(name)
        assert answer["id"] == self._num_calls, "one call is answered before the next is made"
        if "error" not in answer:
            return answer["result"]
        if answer["error"]["kind"] == "memory":
            raise OutOfMemory(answer["error"]["message"])
        raise StageFailed(answer["error"]["message"])

    def close(self) -> None:
        """End the process and all that it started, and wait until it is gone."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for thread in self._threads:
            thread.join(timeout=5)
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe is not None:
                with contextlib.suppress(OSError):  # what was still to be written has no reader
                    pipe.close()

    def _ended(self, name: str) -> StageFailed:
        code = self._process.returncode
        last = next((line for line in reversed(self._log) if line.strip()), "nothing")
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        text = f"its process ended {how} at {name!r}; it said last: {last.strip()[:300]}"
        if code == -signal.SIGKILL:  # the kernel's answer to a host without memory
            return OutOfMemory(f"{text}; the host had no memory left, or somebody killed it")
        return WorkerLost(text)

    def _read_answers(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                self._answers.put(json.loads(line))
            except ValueError:
                self._log.append(line.rstrip())
        self._process.wait()
        self._answers.put(None)

    def _read_log(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._log.append(line.rstrip())
            if logger.isEnabledFor(logging.INFO):
                logger.info("%s", line.rstrip())
            else:
                sys.stderr.write(line)
                sys.stderr.flush()
