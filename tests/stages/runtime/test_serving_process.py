"""A process in another environment: what it answers, how it fails, and that it never outlives who started it."""

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from stages.errors import OutOfMemory, StageFailed, Transient, WorkerLost
from stages.runtime.serving_process import ServingProcess

SCRIPT = """
import json, os, subprocess, sys
print("ready", file=sys.stderr, flush=True)
for line in sys.stdin:
    request = json.loads(line)
    call, given = request["call"], request["arguments"]
    answer = {"id": request["id"]}
    if call == "echo":
        answer["result"] = given
    elif call == "variables":
        answer["result"] = {"path": sys.path, **{name: os.environ.get(name) for name in ("WANTED", "RAY_X")}}
    elif call == "fail":
        answer["error"] = given
    elif call == "hang":
        continue
    elif call == "child":
        answer["result"] = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid
    elif call == "die":
        print("no more memory for this", file=sys.stderr, flush=True)
        os.kill(os.getpid(), given["signal"])
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture
def script(tmp_path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


def start(script, **environment) -> ServingProcess:
    return ServingProcess(sys.executable, script, environment=environment)


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.02)
    return False


def test_calls_are_answered_in_turn_in_an_environment_of_its_own(script, monkeypatch):
    monkeypatch.setenv("RAY_X", "ours")
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    with start(script, WANTED="yes") as process:
        assert process.call("echo", timeout_seconds=20, text="é", number=1.5) == {"text": "é", "number": 1.5}
        found = process.call("variables", timeout_seconds=20)
    assert (found["WANTED"], found["RAY_X"]) == ("yes", None)
    assert str(script.parent) not in found["path"]
    assert "/elsewhere" not in found["path"]
    assert process.log == ["ready"]


@pytest.mark.parametrize(("kind", "expected"), [("failed", StageFailed), ("memory", OutOfMemory)])
def test_error_comes_back_as_ours_and_the_process_lives(script, kind, expected):
    with start(script) as process:
        with pytest.raises(expected, match="ValueError: no kernel") as caught:
            process.call("fail", timeout_seconds=20, kind=kind, message="ValueError: no kernel")
        assert type(caught.value) is expected
        assert process.call("echo", timeout_seconds=20) == {}


def test_call_that_takes_too_long_ends_the_process_and_its_children(script):
    process = start(script)
    child = process.call("child", timeout_seconds=20)
    with pytest.raises(Transient, match=r"did not answer 'hang' within 0\.05 s"):
        process.call("hang", timeout_seconds=0.05)
    assert gone(child)
    with pytest.raises(WorkerLost, match="'echo' was not asked: its process had ended"):
        process.call("echo", timeout_seconds=20)


@pytest.mark.parametrize("level", [logging.INFO, logging.WARNING])
def test_standard_error_goes_to_the_log_or_to_ours_where_the_log_drops_it(script, level, caplog, capsys):
    with caplog.at_level(level), start(script) as process:
        process.call("echo", timeout_seconds=20)
    logged = [record.getMessage() for record in caplog.records]
    assert (logged, capsys.readouterr().err) == ((["ready"], "") if level == logging.INFO else ([], "ready\n"))


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGKILL, OutOfMemory), (signal.SIGSEGV, WorkerLost)])
def test_death_is_told_with_the_signal_and_the_last_words(script, number, expected):
    with start(script) as process, pytest.raises(expected, match=rf"by signal {number:d} .*no more memory for this"):
        process.call("die", timeout_seconds=20, signal=int(number))


def test_python_that_is_not_there_is_named(script):
    with pytest.raises(StageFailed, match="'/no/python' cannot be started"):
        ServingProcess("/no/python", script, environment={})


def test_worker_of_vllm_ends_with_who_started_it(tmp_path):
    """However that goes: here it is killed, and only the end of the pipe tells."""
    worker = Path(__file__).parents[3] / "stages/runtime/vllm_worker.py"
    code = (
        "import subprocess, sys, time\n"
        f"p = subprocess.Popen([sys.executable, '-I', {str(worker)!r}], stdin=subprocess.PIPE, start_new_session=True)\n"
        "print(p.pid, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        pid = int(holder.stdout.readline())
        assert psutil.pid_exists(pid)
        os.kill(holder.pid, signal.SIGKILL)
    assert gone(pid)
