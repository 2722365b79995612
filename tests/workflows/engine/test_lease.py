"""The one lock: who gets it, when, and what a crash, a power cut or a step of the clock does to it."""

import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from stages.storage import Folder
from workflows.engine import heartbeat, lease
from workflows.engine.heartbeat import Holder, Liveness, beating
from workflows.engine.lease import Lease


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    return Folder.at(tmp_path if request.param == "local" else f"{request.getfixturevalue('s3')}/{tmp_path.name}")


def lease_of(root: Folder) -> Lease:
    return Lease(root / "right", Liveness(root / "runs"))


def here(run: str) -> Holder:
    return Holder.of_this_process(run)


def test_acquire_names_the_living_holder_until_it_releases(root: Folder) -> None:
    one = lease_of(root)
    assert one.holder() is None
    assert one.acquire(here("a")) == 1
    assert one.acquire(here("b")) == here("a")
    assert one.acquire(here("a")) == here("a"), "no second time, not even by itself"
    one.release(1)
    one.release(1)
    assert one.holder() is None
    assert one.acquire(here("b")) == 2
    assert one.latest() == 2


def test_acquire_with_renew_overtakes_the_same_run_alone(root: Folder) -> None:
    one = lease_of(root)
    assert one.acquire(here("a"), renew=True) == 1
    assert one.acquire(here("a"), renew=True) == 2
    assert one.acquire(here("b"), renew=True) == here("a")


def test_acquire_from_a_child_that_died_succeeds_at_once(root: Folder) -> None:
    one = lease_of(root)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    holder = replace(here("a"), pid=child.pid, started=heartbeat.start_time(child.pid))
    assert one.acquire(holder) == 1
    assert one.acquire(here("b")) == holder
    child.communicate(b"\n")
    assert one.acquire(here("b")) == 2


@pytest.mark.parametrize("torn", [b"", b'{"run": "a", "ho', b"\0" * 40, b"[]", b'{"run": "a"}'])
def test_claim_that_a_power_cut_tore_is_a_dead_holders(root: Folder, torn: bytes) -> None:
    one = lease_of(root)
    (root / "right").put("claims/000001.json", torn)
    assert one.holder() is None
    assert one.acquire(here("b")) == 2


def test_release_that_a_power_cut_tore_is_a_release(root: Folder) -> None:
    one = lease_of(root)
    one.acquire(here("a"))
    (root / "right").put("released/000001.json", b"")
    assert one.acquire(here("b")) == 2


def test_live_holder_under_a_step_of_the_clock_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    """`psutil` counts a process's start from the boot time, which the kernel moves with the clock."""
    holder = here("a")
    process = psutil.Process
    monkeypatch.setattr(process, "create_time", lambda self: time.time() + 1.5)
    monkeypatch.setattr(psutil, "boot_time", lambda: time.time() + 1.5)
    assert holder.process_lives()
    assert here("a") == holder


def test_start_time_without_proc_is_psutils() -> None:
    with pytest.raises(psutil.NoSuchProcess):
        heartbeat.start_time(2**22 + 1)
    assert here("a").started == heartbeat.start_time(os.getpid())


def test_process_of_the_same_id_that_started_at_another_time_is_another(root: Folder) -> None:
    one = lease_of(root)
    assert one.acquire(replace(here("a"), started=1.0)) == 1
    assert one.acquire(here("b")) == 2


def test_holder_on_another_host_lives_for_its_claim_then_for_its_heartbeat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, now = Folder.at(tmp_path), [100.0]
    monkeypatch.setattr("workflows.engine.heartbeat.time.monotonic", lambda: now[0])
    one, far = lease_of(root), replace(here("far"), host="another-host")
    assert one.acquire(far) == 1
    assert one.holder() == far, "its run has no heartbeat, but it took the lease just now"
    now[0] += 61
    assert one.holder() is None
    with beating(root / "runs", "far"):
        os.utime(tmp_path / "runs" / "far" / "heartbeat.json", (time.time() + 1, time.time() + 1))
        assert one.holder() == far
    now[0] += 61
    assert one.acquire(here("near")) == 2


def test_held_waits_for_the_holder_and_deletes_earlier_terms(root: Folder) -> None:
    first, second = lease_of(root), lease_of(root)
    order: list[str] = []

    def wait() -> None:
        with second.held(here("b")):
            order.append("second")

    with first.held(here("a")):
        waiter = threading.Thread(target=wait)
        waiter.start()
        waiter.join(0.3)
        order.append("first")
    waiter.join(30)
    assert order == ["first", "second"]
    names = [entry.name for entry in (root / "right").entries()]
    assert names == ["claims/000002.json", "released/000002.json"]


def test_held_too_long_is_an_error(root: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "PATIENCE_SECONDS", 0.0)
    one = lease_of(root)
    with one.held(here("a")), pytest.raises(TimeoutError, match="another process"), one.held(here("b")):
        pass
    with one.held(here("b")) as term:
        assert term == 2


def test_held_by_many_threads_lets_one_in_at_a_time(root: Folder) -> None:
    inside: list[int] = []
    most: list[int] = []

    def enter(number: int) -> None:
        with lease_of(root).held(here(f"run-{number}")):
            inside.append(number)
            most.append(len(inside))
            time.sleep(0.01)
            inside.remove(number)

    threads = [threading.Thread(target=enter, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 6
