"""`stillhouse doctor`: what is fine here, what is not, and what to do about it."""

import os
import shutil
import socket
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any, Literal
from urllib.parse import urlsplit

from stages.errors import ConfigError
from stages.storage import cache_root, is_remote
from workflows.engine.ray_executor import local_resources, probe
from workflows.engine.run import Settings
from workflows.engine.store import ArtifactStore

FREE_BYTES_WANTED = 5 * 10**9
"""The quickstart's store takes some 100 MB; a 1-billion-parameter student with its snapshots takes about 5 GB."""
HUB = ("huggingface.co", 443)
CONNECT_SECONDS = 3.0
SUPPORTED = {"ray": "2.60", "torch": "2.1", "transformers": "5.1", "mlflow": "3.17", "llmcompressor": "0.14"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    subject: str
    state: Literal["fine", "note", "wrong"]
    text: str
    remedy: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON."""
        return asdict(self)


def examine(settings: Settings) -> list[Finding]:
    """Look at everything that a run needs; nothing is changed but a probe in the store."""
    parts = (
        _python(),
        _packages(),
        _devices(),
        _ray(settings.address),
        _store(settings),
        _tracking(settings),
        _hub(),
        _disk(settings),
    )
    return [finding for part in parts for finding in part]


def _python() -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    if (3, 11) <= sys.version_info[:2] <= (3, 13):
        yield Finding("Python", "fine", version)
    else:
        yield Finding(
            "Python", "wrong", f"{version}, expected 3.11 to 3.13", "make a virtual environment with another Python"
        )


def _packages() -> Iterator[Finding]:
    for name, prefix in SUPPORTED.items():
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Finding(name, "wrong", "not installed", "pip install -c constraints.txt -e .")
            continue
        if version.startswith(prefix):
            yield Finding(name, "fine", version)
        else:
            yield Finding(name, "wrong", f"{version}, tested with {prefix}.*", "pip install -c constraints.txt -e .")


def _devices() -> Iterator[Finding]:
    import torch

    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
        yield Finding("GPU", "fine", names)
    elif local_resources().gpus:
        yield Finding(
            "GPU",
            "wrong",
            f"{local_resources().gpus:.0f} there, but torch {torch.__version__} cannot use them",
            "install a CUDA build of torch",
        )
    else:
        yield Finding(
            "GPU",
            "note",
            f"none here; steps run on {os.cpu_count()} CPU cores, {torch.get_num_threads()} torch threads",
        )


def _ray(address: str | None) -> Iterator[Finding]:
    mode = os.environ.get("RAY_AUTH_MODE", "token, with a token of its own for each run")
    if address is None:
        yield Finding("Ray", "fine", f"started here for each run; authentication: {mode}")
        return
    try:
        probe(address)
        yield Finding(
            "Ray",
            "fine",
            f"a cluster answers at {address}; authentication: {os.environ.get('RAY_AUTH_MODE', 'Ray’s default')}",
        )
    except ConfigError as error:
        yield Finding(
            "Ray", "wrong", str(error), "check the address and the network; a head listens on 6379 by default"
        )


def _store(settings: Settings) -> Iterator[Finding]:
    store = ArtifactStore(settings.store)
    try:
        store.check_writable()
        yield Finding("store", "fine", f"{store.uri} can be written; {len(store.fingerprints())} artifacts")
    except ConfigError as error:
        yield Finding("store", "wrong", str(error))


def _tracking(settings: Settings) -> Iterator[Finding]:
    uri = settings.tracking(ArtifactStore(settings.store))
    if not uri.startswith(("http://", "https://")):
        yield Finding("MLflow", "fine", uri)
        return
    parts = urlsplit(uri)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    if _connects(parts.hostname or "", port):
        yield Finding("MLflow", "fine", f"a server answers at {parts.hostname}:{port}")
    else:
        yield Finding(
            "MLflow",
            "wrong",
            f"nothing answers at {parts.hostname}:{port}",
            "work goes on without it and the journal is sent later; start it to see runs now",
        )


def _hub() -> Iterator[Finding]:
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        yield Finding("hub", "note", "HF_HUB_OFFLINE=1: hub ids are refused, local checkpoints work")
    elif _connects(*HUB):
        yield Finding(
            "hub", "fine", f"{HUB[0]} answers; HF_TOKEN is {'set' if os.environ.get('HF_TOKEN') else 'not set'}"
        )
    else:
        yield Finding(
            "hub",
            "note",
            f"{HUB[0]} does not answer; local checkpoints and texts work",
            "needed only where a hub id is named",
        )


def _disk(settings: Settings) -> Iterator[Finding]:
    places = {"cache": str(cache_root())}
    if not is_remote(settings.store):
        places["store"] = os.path.abspath(settings.store)
    for name, path in places.items():
        while not os.path.exists(path):
            path = os.path.dirname(path)
        free = shutil.disk_usage(path).free
        state: Literal["fine", "wrong"] = "fine" if free >= FREE_BYTES_WANTED else "wrong"
        remedy = "" if state == "fine" else "free space: stillhouse artifacts gc"
        yield Finding(f"disk ({name})", state, f"{free / 1e9:.0f} GB free at {path}", remedy)


def _connects(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
    except OSError:
        return False
    return True
