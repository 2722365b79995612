"""Real processes killed with -9 at seeded random moments, then the same command: nothing committed runs again."""

import os
import random
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.workflows.run_command import descendants, fingerprints, finish, kill, run, short_quickstart, start, until

pytestmark = [pytest.mark.fault, pytest.mark.timeout(400)]

SEED = int(os.environ.get("STILLHOUSE_FAULT_SEED", "20261121"))
FLOW = '''
"""Two sources that pour slowly, and what is made of them."""

from tests.stages_for_tests import Join, Pour
from workflows.engine.graph import Workflow


def flow(*, log: str, seconds_each: float = 0.25) -> Workflow:
    made = Workflow("flow")
    first = made.step("first", Pour(log=f"{log}/first", num_shards=6, seconds_each=seconds_each))
    second = made.step("second", Pour(log=f"{log}/second", num_shards=12, seconds_each=seconds_each))
    joined = made.step("join.first", Join(), data=first)
    made.step("join.all", Join(), data=second, parts={"first": joined})
    return made
'''


@pytest.fixture
def flow(tmp_path: Path) -> list[str]:
    (tmp_path / "flow.py").write_text(FLOW)
    (tmp_path / "log").mkdir()
    return [str(tmp_path / "flow.py"), "--log", str(tmp_path / "log"), "--store", str(tmp_path / "store")]


def poured(tmp_path: Path, name: str) -> list[str]:
    path = tmp_path / "log" / name
    return path.read_text().split() if path.exists() else []


def test_driver_killed_at_random_moments_then_the_same_command_pours_no_shard_again(
    flow: list[str], tmp_path: Path
) -> None:
    """A shard whose receipt is written is never poured again; the one in the kettle at a kill may be."""
    print(f"seed {SEED}")
    generator = random.Random(SEED)
    kills = 2
    for _ in range(kills):
        process = start("run", *flow, "--json")
        before = len(poured(tmp_path, "second"))
        until(lambda before=before: len(poured(tmp_path, "second")) > before, of=process)
        time.sleep(generator.uniform(0.0, 0.8))
        kill(process)
        process.wait(timeout=20)
    document = run("run", *flow)
    assert document["outcome"] == "succeeded"
    for name, num_shards in (("first", 6), ("second", 12)):
        lines = poured(tmp_path, name)
        assert set(lines) == {str(index) for index in range(num_shards)}
        # A killed driver's tasks pour on until Ray ends them, beside the successor's: a shard or two at each kill.
        assert len(lines) <= num_shards + 3 * kills, lines
    again = run("run", *flow)
    assert again["executed"] == 0
    assert fingerprints(again) == fingerprints(document)


def test_ctrl_c_and_a_schedulers_sigterm_stop_within_seconds_a_second_at_once_and_the_same_command_goes_on(
    flow: list[str], tmp_path: Path
) -> None:
    slow = [*flow, "--seconds-each", "0.5"]
    for number, exit_code, send in ((signal.SIGINT, 130, os.kill), (signal.SIGTERM, 143, os.killpg)):
        process = start("run", *slow, "--json")
        before = len(poured(tmp_path, "second"))
        until(lambda before=before: len(poured(tmp_path, "second")) >= before + 2, of=process)
        send(process.pid, number)  # Slurm and systemd send theirs to all of a job's processes
        pressed = time.monotonic()
        document = finish(process, exit_code=exit_code, timeout_seconds=60)
        assert time.monotonic() - pressed < 20
        assert document["outcome"] == "interrupted"
        before = len(poured(tmp_path, "second"))
        time.sleep(1.5)
        assert len(poured(tmp_path, "second")) == before, "nothing pours on"
    process = start("run", *slow, "--json")
    before = len(poured(tmp_path, "second"))
    until(lambda: len(poured(tmp_path, "second")) > before, of=process)
    started = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=2) == 130
    _, alive = psutil.wait_procs(started, timeout=20)
    assert not alive
    assert run("run", *slow)["outcome"] == "succeeded"


def test_worker_killed_its_step_is_tried_again_and_succeeds(tmp_path: Path) -> None:
    """What a killed process had reserved on the cluster is released, or the next attempt would wait for ever."""
    generator = random.Random(SEED)
    changes = {"max_documents": 600, "teacher.layers": 6, "teacher_steps": 100}  # long enough to be killed half-way
    command = ["run", *short_quickstart(**changes), "--only", "signals", "--store", str(tmp_path / "store")]
    process = start(*command, "--json")
    # Which process shows that a step is at work, and which is then killed; Ray Data's actors are the teacher's.
    training, inference = "ray::RayTrainWorker", "ray::MapWorker"
    seen: set[int] = set()
    for worker, victim, longest in (
        (training, training, 2.0),
        (training, "ray::FreshWorker", 2.0),
        (inference, inference, 0.3),  # it is at work for some seconds only
    ):
        until(
            lambda worker=worker, old=frozenset(seen): {each.pid for each in descendants(process, worker)} - old,
            of=process,
            timeout_seconds=200,
        )
        time.sleep(generator.uniform(0.1, longest))
        seen |= {each.pid for each in descendants(process, worker)}
        # A process that changes its title just now is not found.
        kill(generator.choice(until(lambda victim=victim: descendants(process, victim), of=process)))
    document = finish(process)
    attempts = {step["name"]: (step["outcome"], step["attempts"]) for step in document["steps"]}
    assert attempts["teacher"] == ("committed", 3)
    assert attempts["signals"] == ("committed", 2)
    again = run(*command)
    assert again["executed"] == 0
    assert fingerprints(again) == fingerprints(document)
