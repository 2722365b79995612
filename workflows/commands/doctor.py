"""`stillhouse doctor`: what is fine here, what is not, and what to do about it."""

import os
import platform
import shutil
import socket
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Literal

from rich.text import Text

from stages.errors import ConfigError
from stages.storage import cache_root, is_remote
from workflows.commands.options import DEFAULT_STORE, FAILED, OK, Address, Json, Store, TrackingUri
from workflows.commands.output import console, plain_table, print_json
from workflows.engine.ray_executor import local_resources, probe
from workflows.engine.redaction import redacted
from workflows.engine.run import Settings
from workflows.engine.store import ArtifactStore
from workflows.engine.tracking.tracking_uri import TrackingUnavailable, check_tracking_uri, is_server, sqlite_path

FREE_BYTES_WANTED = 5 * 10**9
"""The quickstart's store takes some 100 MB; a 1-billion-parameter student with its snapshots takes about 5 GB."""
HUB = "huggingface.co"
CONNECT_SECONDS = 3.0
SUPPORTED = {"ray": "2.60", "torch": "2.1", "transformers": "5.1", "mlflow": "3.17", "llmcompressor": "0.14"}
"""Package → how the versions begin that it is tested with."""
INSTALL = "pip install -c constraints.txt -e ."
MARK = {"fine": ("✓", "green"), "note": ("·", "dim"), "wrong": ("✗", "bold red")}


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found."""

    state: Literal["fine", "note", "wrong"]
    text: str
    remedy: str = ""


def doctor(
    *,
    store: Store = DEFAULT_STORE,
    tracking_uri: TrackingUri = None,
    address: Address = None,
    json: Json = False,
) -> int:
    """Look at Python, torch, GPU, Ray, MLflow, store, hub and disk: what is fine, what is not, what to do.

    Nothing is changed but a probe in the store.
    """
    opened = ArtifactStore(store)
    checks: dict[str, Callable[[], Finding]] = {
        "Python": _python,
        **{name: partial(_package, name) for name in SUPPORTED},
        "GPU": _devices,
        "Ray": partial(_ray, address),
        "store": partial(_store, opened),
        "MLflow": partial(_tracking, Settings(store, tracking_uri), opened),
        "hub": _hub,
        "disk (cache)": partial(_disk, str(cache_root())),
    }
    if not is_remote(opened.uri):
        checks["disk (store)"] = partial(_disk, opened.uri)
    findings = {}
    for name, check in checks.items():
        try:
            findings[name] = check()
        except ConfigError as error:
            findings[name] = Finding("wrong", str(error))
    if json:
        print_json({"findings": [{"subject": name, **asdict(found)} for name, found in findings.items()]})
    else:
        table = plain_table()
        for name, found in findings.items():
            mark, style = MARK[found.state]
            remedy = f"\n→ {found.remedy}" if found.remedy else ""
            table.add_row(Text(mark, style=style), name, found.text + remedy)
        console().print(table)
    return FAILED if any(found.state == "wrong" for found in findings.values()) else OK


def _python() -> Finding:
    version = platform.python_version()
    if (3, 11) <= sys.version_info[:2] <= (3, 13):
        return Finding("fine", version)
    return Finding("wrong", f"{version}, expected 3.11 to 3.13", "make a virtual environment with another Python")


def _package(name: str) -> Finding:
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Finding("wrong", "not installed", INSTALL)
    if version.startswith(SUPPORTED[name]):
        return Finding("fine", version)
    return Finding("wrong", f"{version}, tested with {SUPPORTED[name]}.*", INSTALL)


def _devices() -> Finding:
    import torch

    if torch.cuda.is_available():
        return Finding("fine", ", ".join(map(torch.cuda.get_device_name, range(torch.cuda.device_count()))))
    if gpus := local_resources().gpus:
        text = f"{gpus:.0f} there, but torch {torch.__version__} cannot use them"
        return Finding("wrong", text, "install a CUDA build of torch")
    cores = f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} torch threads"
    return Finding("note", f"none here; steps run on {cores}")


def _ray(address: str | None) -> Finding:
    mode = os.environ.get("RAY_AUTH_MODE")
    if address is None:
        mode = mode or "token, with a token of its own for each run"
        return Finding("fine", f"started here for each run; authentication: {mode}")
    probe(address)
    return Finding("fine", f"a cluster answers at {address}; authentication: {mode or 'Ray’s default'}")


def _store(store: ArtifactStore) -> Finding:
    store.check_writable()
    return Finding("fine", f"{store.uri} can be written; {len(store.fingerprints())} artifacts")


def _tracking(settings: Settings, store: ArtifactStore) -> Finding:
    uri = settings.tracking(store)
    try:
        problem = check_tracking_uri(uri)
    except TrackingUnavailable as error:
        remedy = "work goes on without it and its events are published later; put it right to see runs now"
        return Finding("wrong", str(error), remedy)
    kind = "a server answers at " if is_server(uri) else "" if sqlite_path(uri) else "a database answers at "
    return Finding("note" if problem else "fine", kind + redacted(uri) + (problem and f"; {problem}"))


def _hub() -> Finding:
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        return Finding("note", "HF_HUB_OFFLINE=1: hub ids are refused, local checkpoints work")
    try:
        socket.create_connection((HUB, 443), timeout=CONNECT_SECONDS).close()
    except OSError:
        text = f"{HUB} does not answer; local checkpoints and texts work"
        return Finding("note", text, "needed only where a hub id is named")
    return Finding("fine", f"{HUB} answers; HF_TOKEN is {'set' if os.environ.get('HF_TOKEN') else 'not set'}")


def _disk(path: str) -> Finding:
    there = next(folder for folder in (Path(path), *Path(path).parents) if folder.exists())
    free = shutil.disk_usage(there).free
    text = f"{free / 1e9:.0f} GB free at {there}"
    enough = free >= FREE_BYTES_WANTED
    return Finding("fine", text) if enough else Finding("wrong", text, "free space: stillhouse artifacts gc")
