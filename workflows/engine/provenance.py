"""Evidence about where a result came from: commit, code digests, package versions, host. Recorded, never identity."""

import hashlib
import inspect
import platform
import re
import socket
import subprocess
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "stillhouse", "torch", "transformers", "ray", "datasets", "tokenizers", "llmcompressor", "compressed-tensors",
    "numpy", "pyarrow",
)  # fmt: skip
"""Packages whose version may explain a difference between two results."""


ROOT = Path(__file__).parents[2]
"""The folder that holds `stages` and `workflows`."""
IMPORTS = re.compile(
    r"^[ \t]*(?:from[ \t]+([.\w]+)[ \t]+import[ \t]*(\([^)]*\)|[^\n]*)|import[ \t]+([^\n#]*))", re.MULTILINE
)
"""An import statement: source and names, or modules. Parsing the files instead took 0.2 s of each plan; a line of text
that looks like one only adds a file to a digest."""


@cache
def code_digest(stage: type) -> str:
    """Return a digest of the code that a stage's results come from: its file and all that this imports of ours.

    Python that does not parse, half saved perhaps, counts by its bytes, and a file that is gone as empty.
    """
    files = code_files(Path(inspect.getfile(stage)))
    named = {file.relative_to(ROOT).as_posix() if file.is_relative_to(ROOT) else file.name: file for file in files}
    digest = hashlib.sha256()
    for name, file in sorted(named.items()):
        digest.update(f"{name}\0".encode() + _read(file))
    return digest.hexdigest()[:16]


def code_files(source: Path, root: Path = ROOT) -> set[Path]:
    """Return a file and the files below a root that it imports, and that those import.

    Imports inside functions count. Packages count too, since `import a.b` runs `a/__init__.py`.
    """
    found: set[Path] = set()
    todo = [source]
    while todo:
        file = todo.pop()
        if file not in found:
            found.add(file)
            todo.extend(_imported_files(file, root))
    return found


def _read(file: Path) -> bytes:
    with suppress(OSError):
        return file.read_bytes()
    return b""


@cache
def _imported_files(file: Path, root: Path) -> frozenset[Path]:
    modules: set[str] = set()
    for source, names, plain in IMPORTS.findall(_read(file).decode(errors="replace")):
        modules |= {name.split()[0] for name in plain.split(",") if name.split()}
        if source:
            level = len(source) - len(source.lstrip("."))
            package = file.relative_to(root).parts[:-level] if level and file.is_relative_to(root) else ()
            base = ".".join([*package, *filter(None, [source[level:]])])
            modules |= {base, *(f"{base}.{name}" for name in re.findall(r"\w+", names))}
    ours = {path.stem for path in root.iterdir()}
    paths = {root.joinpath(*module.split(".")) for module in modules if module.partition(".")[0] in ours}
    files = {p.with_suffix(".py") for p in paths}
    for path in paths:
        files |= {folder / "__init__.py" for folder in (path, *path.parents) if folder.is_relative_to(root)}
    return frozenset(file for file in files if file != root / "__init__.py" and file.is_file())


@cache
def git_commit() -> str:
    """Return the repository's commit, with `+dirty` where files differ from it; `unknown` outside of a checkout."""

    def ask(*words: str) -> str:
        command = ["git", "-C", str(ROOT), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout.strip()

    try:
        return ask("rev-parse", "HEAD") + ("+dirty" if ask("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def code_evidence(stage: type) -> dict[str, str]:
    """Return what a manifest records about the code that a result came from; asked on the driver, which has it."""
    return {"commit": git_commit(), "code_digest": code_digest(stage)}


@cache
def environment() -> dict[str, Any]:
    """Return what a manifest records about the worker that a result came from."""
    versions = {}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "packages": versions,
        "python": platform.python_version(),
        "host": socket.gethostname(),
        "platform": platform.platform(),
    }
