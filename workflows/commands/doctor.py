"""`stillhouse doctor`: what is fine here, what is not, and what to do about it."""

import os
import platform
import shutil
import socket
import sys
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Literal

from rich.text import Text

from stages.errors import ConfigError
from stages.storage import cache_root, is_remote
from workflows.commands.formatting import plain_table
from workflows.commands.options import FAILED, OK, OutputOptions, TrackingOptions
from workflows.commands.output import console, print_json
from workflows.engine.ray_executor import local_resources, probe
from workflows.engine.redaction import redacted
from workflows.engine.run import Settings
from workflows.engine.store import ArtifactStore
from workflows.engine.tracking.tracking_uri import TrackingUnavailable, check_tracking_uri, is_server, sqlite_path

FREE_BYTES_WANTED = 5 * 10**9
"""The quickstart's store takes some 100 MB; a 1-billion-parameter student with its snapshots takes about 5 GB."""
HUB = ("huggingface.co", 443)
CONNECT_SECONDS = 3.0
SUPPORTED = {"ray": "2.60", "torch": "2.1", "transformers": "5.1", "mlflow": "3.17", "llmcompressor": "0.14"}
"""Package → how the versions begin that it is tested with."""
INSTALL = "pip install -c constraints.txt -e ."
DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
MARK = {"fine": ("✓", "green"), "note": ("·", "dim"), "wrong": ("✗", "bold red")}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    subject: str
    state: Literal["fine", "note", "wrong"]
    text: str
    remedy: str = ""


def doctor(
    *,
    at: TrackingOptions = TrackingOptions(),
    address: str | None = None,
    output: OutputOptions = OutputOptions(),
) -> int:
    """Look at Python, torch, GPU, Ray, MLflow, store, hub and disk: what is fine, what is not, what to do.

    Args:
        address: HOST:PORT of a Ray cluster's head.
    """
    findings = examine(replace(at.settings, address=address))
    if output.json:
        print_json({"findings": [asdict(finding) for finding in findings]})
    else:
        table = plain_table()
        for finding in findings:
            mark, style = MARK[finding.state]
            remedy = f"\n→ {finding.remedy}" if finding.remedy else ""
            table.add_row(Text(mark, style=style), finding.subject, finding.text + remedy)
        console().print(table)
    return FAILED if any(finding.state == "wrong" for finding in findings) else OK


def examine(settings: Settings) -> list[Finding]:
    """Look at everything that a run needs; nothing is changed but a probe in the store."""
    store = ArtifactStore(settings.store)
    places = {"cache": str(cache_root())} | ({} if is_remote(store.uri) else {"store": store.uri})
    return [
        _python(),
        *map(_package, SUPPORTED),
        _devices(),
        _ray(settings.address),
        _store(store),
        _tracking(settings, store),
        _hub(),
        *(_disk(name, path) for name, path in places.items()),
    ]


def _python() -> Finding:
    version = platform.python_version()
    if (3, 11) <= sys.version_info[:2] <= (3, 13):
        return Finding("Python", "fine", version)
    remedy = "make a virtual environment with another Python"
    return Finding("Python", "wrong", f"{version}, expected 3.11 to 3.13", remedy)


def _package(name: str) -> Finding:
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Finding(name, "wrong", "not installed", INSTALL)
    if version.startswith(SUPPORTED[name]):
        return Finding(name, "fine", version)
    return Finding(name, "wrong", f"{version}, tested with {SUPPORTED[name]}.*", INSTALL)


def _devices() -> Finding:
    import torch

    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
        return Finding("GPU", "fine", names)
    if gpus := local_resources().gpus:
        text = f"{gpus:.0f} there, but torch {torch.__version__} cannot use them"
        return Finding("GPU", "wrong", text, "install a CUDA build of torch")
    text = f"none here; steps run on {os.cpu_count()} CPU cores, {torch.get_num_threads()} torch threads"
    return Finding("GPU", "note", text)


def _ray(address: str | None) -> Finding:
    mode = os.environ.get("RAY_AUTH_MODE")
    if address is None:
        text = f"started here for each run; authentication: {mode or 'token, with a token of its own for each run'}"
        return Finding("Ray", "fine", text)
    try:
        probe(address)
    except ConfigError as error:
        remedy = "check the address and the network; a head listens on 6379 by default"
        return Finding("Ray", "wrong", str(error), remedy)
    return Finding("Ray", "fine", f"a cluster answers at {address}; authentication: {mode or 'Ray’s default'}")


def _store(store: ArtifactStore) -> Finding:
    try:
        store.check_writable()
    except ConfigError as error:
        return Finding("store", "wrong", str(error))
    return Finding("store", "fine", f"{store.uri} can be written; {len(store.fingerprints())} artifacts")


def _tracking(settings: Settings, store: ArtifactStore) -> Finding:
    try:
        uri = settings.tracking(store)
        check_tracking_uri(uri)
        if sqlite_path(uri) is None and not is_server(uri):
            _check_database(uri)
    except TrackingUnavailable as error:
        remedy = "work goes on without it and its events are published later; start it to see runs now"
        return Finding("MLflow", "wrong", str(error), remedy)
    except ConfigError as error:
        return Finding("MLflow", "wrong", str(error))
    kind = "a server answers at " if is_server(uri) else "" if sqlite_path(uri) else "a database answers at "
    return Finding("MLflow", "fine", kind + redacted(uri))


def _check_database(uri: str) -> None:
    """Check that a database's URI is one, its driver is installed, and something listens there; nobody logs in.

    Raises:
        ConfigError: it is no URI, or there is no driver for it.
        TrackingUnavailable: nothing listens there.
    """
    from sqlalchemy import make_url
    from sqlalchemy.exc import SQLAlchemyError

    try:
        parts = make_url(uri)
        parts.get_dialect().import_dbapi()
    except (SQLAlchemyError, ValueError) as error:
        raise ConfigError(f"the tracking URI {redacted(uri)} is no database's ({redacted(str(error))})") from error
    except ImportError as error:
        raise ConfigError(f"{redacted(uri)} needs a driver that is not installed: pip install {error.name}") from error
    port = parts.port or DATABASE_PORTS[parts.get_backend_name()]
    if parts.host and not _connects(parts.host, port):
        raise TrackingUnavailable(f"no database answers at {parts.host}:{port}")


def _hub() -> Finding:
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        return Finding("hub", "note", "HF_HUB_OFFLINE=1: hub ids are refused, local checkpoints work")
    if _connects(*HUB):
        token = "set" if os.environ.get("HF_TOKEN") else "not set"
        return Finding("hub", "fine", f"{HUB[0]} answers; HF_TOKEN is {token}")
    text = f"{HUB[0]} does not answer; local checkpoints and texts work"
    return Finding("hub", "note", text, "needed only where a hub id is named")


def _disk(name: str, path: str) -> Finding:
    there = next(folder for folder in (Path(path), *Path(path).parents) if folder.exists())
    free = shutil.disk_usage(there).free
    text = f"{free / 1e9:.0f} GB free at {there}"
    if free >= FREE_BYTES_WANTED:
        return Finding(f"disk ({name})", "fine", text)
    return Finding(f"disk ({name})", "wrong", text, "free space: stillhouse artifacts gc")


def _connects(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
    except OSError:
        return False
    return True
