"""Digests of files and objects from outside, each taken once and then cached; and hints for names that do not exist.

Promises: a digest is cached by path, size, mtime and inode (an object's by URI, size and time of change) in one file
below the cache root, which concurrent processes may append to; a lost or unwritable cache only costs time.

An object in an object store is hashed by streaming it once, so that a corpus on S3 has the identity of its local copy.
An ETag would not give that: it depends on the parts in which the object was uploaded.
"""

import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from functools import partial
from pathlib import Path

from stages.errors import ExternalDataError
from stages.storage import Entry, File, Folder, cache_root, sha256_of

logger = logging.getLogger(__name__)

WatchDigest = Callable[[str, int], None]
"""Is called with a file's name and the size of each chunk of it that was read; may raise to stop."""

SETTLED_SECONDS = 2.0
"""A file that changed later than this ago is hashed but not cached: a second write within one tick of the file
system's clock (up to 1 s on NFS) would leave size and mtime as they were (git calls such a file racily clean)."""


def _read_digests() -> dict[str, str]:
    """Read the cache; a line torn by a crash is skipped."""
    known: dict[str, str] = {}
    try:
        lines = (cache_root() / "digests.jsonl").read_bytes().splitlines()
    except OSError:
        return known
    for line in lines:
        try:
            key, digest = json.loads(line)
        except ValueError:
            continue
        known[key] = digest
    return known


def _add_digests(found: Mapping[str, str]) -> None:
    """Append to the cache with one write, which the kernel keeps whole among concurrent appenders."""
    if not found:
        return
    path = cache_root() / "digests.jsonl"
    # The leading newline ends a line that a crash may have torn.
    data = "".join(f"\n{json.dumps([key, digest])}" for key, digest in found.items()) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        target = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(target, data.encode())
        finally:
            os.close(target)
    except OSError as error:  # a read-only cache only costs time
        logger.warning("cannot cache digests in %s: %s", path, error)


def _stat_key(path: Path) -> tuple[str, int, bool]:
    """Return (cache key, size in bytes, whether the file is old enough to be cached)."""
    stat = path.stat()
    key = json.dumps([str(path.absolute()), stat.st_size, stat.st_mtime_ns, stat.st_ino])
    return key, stat.st_size, time.time() - stat.st_mtime > SETTLED_SECONDS


def digest_files(
    named: Mapping[str, Path], watch: WatchDigest | None = None, *, anew: bool = False
) -> tuple[File, ...]:
    """Hash local files, through the cache.

    Args:
        named: logical name → path.
        watch: is called with the logical name and the size of each chunk that is read; may raise to stop.
        anew: whether also those in the cache are hashed, and the cache brought up to date.

    Raises:
        ExternalDataError: a file cannot be read.
    """
    known, files = {} if anew else _read_digests(), []
    fresh: dict[str, str] = {}
    try:
        for name, path in named.items():
            key, size, settled = _stat_key(path)
            digest = known.get(key) or fresh.get(key) or sha256_of(path, watch and partial(watch, name))
            if settled and key not in known and _stat_key(path)[0] == key:
                fresh[key] = digest
            files.append(File(name, str(path.absolute()), size, digest))
    except OSError as error:
        raise ExternalDataError(
            f"cannot read {str(path)!r}: {error.strerror or error}; check the path and its permissions"
        ) from error
    finally:
        _add_digests(fresh)  # also of work that was interrupted
    return tuple(files)


def digest_objects(
    folder: Folder, names: Iterable[str] | None = None, watch: WatchDigest | None = None, *, anew: bool = False
) -> tuple[File, ...]:
    """Hash objects below a remote folder, through the cache; all of them where `names` is None. The rest: as above."""
    wanted = None if names is None else set(names)
    known, files = {} if anew else _read_digests(), []
    fresh: dict[str, str] = {}
    try:
        for entry in list_objects(folder):
            if wanted is not None and entry.name not in wanted:
                continue
            key = json.dumps([folder.uri_of(entry.name), entry.size_bytes, entry.modified])
            digest = known.get(key)
            if digest is None:
                digest = fresh[key] = folder.digest(entry.name, watch and partial(watch, entry.name)).sha256
            files.append(File(entry.name, folder.uri_of(entry.name), entry.size_bytes, digest))
    finally:
        _add_digests(fresh)
    return tuple(files)


def digests_below(
    folder: Folder, names: Iterable[str], watch: WatchDigest | None, *, anew: bool = False
) -> dict[str, str]:
    """Return name → sha256 of files or objects below a folder, through the cache.

    Raises:
        ExternalDataError: one cannot be read.
    """
    root = folder.local_path()
    if root is None:
        found = digest_objects(folder, names, watch, anew=anew)
    else:
        found = digest_files({name: root / name for name in names}, watch, anew=anew)
    return {file.name: file.sha256 for file in found}


def list_objects(folder: Folder) -> list[Entry]:
    """List all objects below a remote folder.

    Raises:
        ExternalDataError: the store is out of reach, or refuses.
    """
    try:
        return folder.entries()
    except Exception as error:  # obstore raises one type per cause and backend
        cause = " ".join(str(error).partition("\n\nDebug source")[0].split())
        raise ExternalDataError(
            f"cannot list {folder.uri!r}: {cause}; check the bucket, the credentials (AWS_*) and the network"
        ) from error


def nearest_path(path: Path) -> str:
    """Return a hint that names the nearest path that exists, or the first part that is missing."""
    missing, parent = path, path.parent
    while not parent.exists() and parent != parent.parent:
        missing, parent = parent, parent.parent
    names = [child.name for child in parent.iterdir()] if parent.is_dir() else []
    close = get_close_matches(missing.name, names, n=1, cutoff=0.5)
    return f"did you mean {str(parent / close[0])!r}?" if close else f"{str(parent)!r} has no {missing.name!r}"
