"""Evidence about where a result came from: commit, code digests, package versions, host. Recorded, never identity."""

import hashlib
import inspect
import platform
import socket
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "stillhouse",
    "torch",
    "transformers",
    "ray",
    "datasets",
    "tokenizers",
    "llmcompressor",
    "compressed-tensors",
    "numpy",
    "pyarrow",
)
"""Packages whose version may explain a difference between two results."""


@cache
def code_digest(stage: type) -> str:
    """Return a digest of the code that a stage's results come from: its folder and `stages/ops`, or a user's file."""
    source = Path(inspect.getfile(stage))
    files = [source]
    if source.name == "stage.py":
        files = sorted([*source.parent.rglob("*.py"), *(source.parents[1] / "ops").glob("*.py")])
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.parent.name}/{file.name}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


@cache
def git_commit() -> str:
    """Return the repository's commit, with `+dirty` where files differ from it; `unknown` outside of a checkout."""
    folder = Path(__file__).parent
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True, timeout=5
        ).stdout.strip()
        status = subprocess.run(
            ["git", "status", "--porcelain"], cwd=folder, capture_output=True, text=True, check=True, timeout=5
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return commit + ("+dirty" if status.strip() else "")


@cache
def packages() -> dict[str, str]:
    """Return the versions of the packages that matter."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def code_evidence(stage: type) -> dict[str, str]:
    """Return what a manifest records about the code that a result came from; asked on the driver, which has it."""
    return {"commit": git_commit(), "code_digest": code_digest(stage)}


def environment() -> dict[str, Any]:
    """Return what a manifest records about the worker that a result came from."""
    return {
        "packages": packages(),
        "python": platform.python_version(),
        "host": socket.gethostname(),
        "platform": platform.platform(),
    }
