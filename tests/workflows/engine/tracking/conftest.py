"""Fixtures of the tests of tracking: a sqlite file and a real MLflow server."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.workflows.engine.tracking.place import Place, answers, free_port, wait_until
from workflows.engine.tracking.tracking_uri import default_tracking_uri

START_SECONDS = 120.0
"""How long the server may take on a loaded machine; alone it takes some 9 s."""


Served = tuple[str, Path]
"""(tracking URI, the folder of its artifacts)."""


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache that these tests share, so that MLflow's tables are made once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STILLHOUSE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def sqlite(tmp_path: Path) -> Place:
    return Place(tmp_path, default_tracking_uri(str(tmp_path)))


@pytest.fixture(scope="session")
def server_uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real MLflow server on loopback."""
    folder = tmp_path_factory.mktemp("server")
    with serving(folder, "--artifacts-destination", str(folder / "artifacts")) as uri:
        yield uri


@pytest.fixture(scope="session")
def server_without_proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A real MLflow server that has its clients write artifacts themselves, below a path."""
    folder = tmp_path_factory.mktemp("without-proxy")
    root = folder / "of-another-machine"
    with serving(folder, "--no-serve-artifacts", "--default-artifact-root", root.as_uri()) as uri:
        yield uri, root


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[str]:
    """Start a server whose database is in a folder, and yield its URI."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/db", *options]
    with (folder / "log").open("w") as log:
        environ = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environ, cwd=folder, start_new_session=True)
    try:
        wait_until(lambda: answers(f"http://127.0.0.1:{port}/health"), START_SECONDS)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGKILL)  # its workers are in the session that it leads
        server.wait(30)


@pytest.fixture
def place(request: pytest.FixtureRequest) -> Place:
    """The place that a test names: a sqlite file or the server, with the experiment to itself."""
    if request.param == "sqlite":
        return request.getfixturevalue("sqlite")  # type: ignore[no-any-return]
    return Place(request.getfixturevalue("tmp_path"), request.getfixturevalue("server_uri"))
