"""The real command in a process of its own, as a user runs it; and finding its processes in order to kill them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
SMALL = {
    **{"max_documents": 120, "vocabulary_size": 400, "sequence_length": 32},
    **{"teacher.layers": 2, "teacher.width": 64, "teacher.heads": 2, "teacher.ffn_width": 128},
    **{"student.layers": 1, "student.width": 64, "student.heads": 2, "student.ffn_width": 128},
    **{"teacher_steps": 12, "student_steps": 12, "batch_rows": 8, "k": 8},
}


SCHEMES = ('{"weight_bits": 8}', '{"weight_bits": 4, "group_size": 32}', '{"weight_bits": 3, "algorithm": "gptq"}')


def short_quickstart(**changes: int) -> list[str]:
    """Return the quickstart with parameters that make it short: what is tested is the chain, not the models."""
    options = [f"--{name.replace('_', '-')}={value}" for name, value in {**SMALL, **changes}.items()]
    return ["quickstart", *options, *(f"--schemes={scheme}" for scheme in SCHEMES)]


def start(*argv: str, cwd: Path = ROOT) -> subprocess.Popen[str]:
    """Start `stillhouse …` with its output kept."""
    command = [sys.executable, "-m", "workflows.cli", *argv]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    environment.pop("RAY_AUTH_MODE", None)  # as a user has it
    return subprocess.Popen(
        command,
        cwd=cwd,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], *, exit_code: int = 0, timeout_seconds: float = 280) -> Any:
    """Wait for a command with --json and return its document."""
    out, err = process.communicate(timeout=timeout_seconds)
    assert process.returncode == exit_code, f"exit code {process.returncode}\n{out}\n{err}"
    return json.loads(out)


def run(*argv: str, exit_code: int = 0, cwd: Path = ROOT) -> Any:
    """Run `stillhouse … --json` and return its document."""
    return finish(start(*argv, "--json", cwd=cwd), exit_code=exit_code)


def until(found: Callable[[], Any], *, timeout_seconds: float = 120, of: subprocess.Popen[str] | None = None) -> Any:
    """Wait until something is true, and return it."""
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        if value := found():
            return value
        assert of is None or of.poll() is None, "the command ended before what was waited for"
        time.sleep(0.05)
    raise AssertionError("it did not happen in time")


def descendants(process: subprocess.Popen[str], title: str) -> list[psutil.Process]:
    """Return a command's living processes whose title has a word, e.g. `ray::RayTrainWorker`."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if title in " ".join(child.cmdline()):
                found.append(child)
        except psutil.Error:
            continue
    return found


def kill(process: psutil.Process | subprocess.Popen[str]) -> None:
    """Send SIGKILL to one process by its id."""
    os.kill(process.pid, signal.SIGKILL)


def fingerprints(document: Any) -> dict[str, str]:
    """Return step → fingerprint of a run's document."""
    return {step["name"]: step["fingerprint"] for step in document["steps"]}
