"""Folders in a store, by URI: local disk, S3, GCS and Azure through `obstore`, behind six verbs.

Promises: `put(create=True)` writes an object whole or raises `AlreadyExists`, and of two writers one wins; a
reader never sees half an object; with `durable`, nor after a power cut; what is written to an object store carries its
sha256 as metadata, so that nobody reads it back to hash it; `fetch` gives a local path (where it lies, or a verified
download in the cache).
Does not: rename, append or lock: nothing in the store is ever changed in place but a run's heartbeat.

Credentials and endpoints come from the environment only (`AWS_*`, `GOOGLE_*`, `AZURE_*`).
"""

import contextlib
import hashlib
import json
import logging
import os
import secrets
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import obstore
from obstore.exceptions import AlreadyExistsError as AlreadyExists
from obstore.exceptions import BaseError
from obstore.store import LocalStore, ObjectStore, from_url

from stages.errors import ConfigError, StageFailed

if TYPE_CHECKING:
    from obstore.store import ClientConfig

__all__ = ["STORE_ERRORS", "AlreadyExists", "Entry", "File", "Folder", "cache_root", "fetch", "is_remote", "sha256_of"]

logger = logging.getLogger(__name__)

STORE_ERRORS = (OSError, BaseError)
"""What every method here may raise where the store, or the way to it, fails."""
CHUNK_BYTES = 8 * 1024 * 1024
"""Read and write granularity: large enough that S3 multipart parts are legal (≥ 5 MiB)."""
DIGEST_METADATA = "sha256"
"""Under this name an object in an object store says what was written."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One object in a folder."""

    name: str
    size_bytes: int
    modified: float
    """Seconds since the epoch, by the store's clock."""


@dataclass(frozen=True, slots=True)
class File:
    """One file of an artifact: its logical name, where it lies, and what its bytes are."""

    name: str
    uri: str
    size_bytes: int
    sha256: str


def is_remote(uri: str) -> bool:
    """Return whether a URI points to an object store rather than to a path on a disk."""
    return "://" in uri and not uri.startswith("file://")


def cache_root() -> Path:
    """Return the folder for downloads and digest caches: `$STILLHOUSE_CACHE`, else `~/.cache/stillhouse`."""
    if given := os.environ.get("STILLHOUSE_CACHE"):
        return Path(given)
    try:
        return Path.home() / ".cache" / "stillhouse"
    except RuntimeError:  # a user id without a passwd entry and without HOME, as containers have
        return Path(tempfile.gettempdir()) / f"stillhouse-{os.getuid()}"


@lru_cache(maxsize=32)
def _open(root: str) -> ObjectStore:
    """Open the store at a root URI, once a process."""
    if not is_remote(root):
        return LocalStore("/")
    insecure = os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://")
    options: ClientConfig = {"allow_http": True} if insecure and root.startswith("s3") else {}
    try:
        return from_url(root, client_options=options)
    except Exception as error:
        problem = f"cannot open the store {root!r}: {error}"
        raise ConfigError(f"{problem}; expected a path, s3://, gs:// or az:// URI") from error


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder in a store. Names inside it are relative and use `/`."""

    uri: str
    """An absolute local path, or `scheme://bucket/prefix`; without a slash at the end."""

    @classmethod
    def at(cls, uri: str | Path) -> "Folder":
        """Return the folder at a path or URI; a relative path is taken from the current directory.

        Raises:
            ConfigError: it names no place.
        """
        text = str(uri).removeprefix("file://")
        if not text or (is_remote(text) and not text.partition("://")[2].strip("/")):
            raise ConfigError(f"{str(uri)!r} names no place; expected a path, or a URI such as s3://BUCKET/PREFIX")
        path = Path(text).resolve() if ".." in text else Path(text).absolute()  # obstore takes no `..`
        return cls(text.rstrip("/") if is_remote(text) else str(path))

    def _key(self, name: str) -> tuple[ObjectStore, str]:
        if not is_remote(self.uri):
            return _open("/"), f"{self.uri}/{name}".strip("/")
        scheme, _, rest = self.uri.partition("://")
        bucket, _, prefix = rest.partition("/")
        return _open(f"{scheme}://{bucket}"), f"{prefix}/{name}".strip("/")

    def __truediv__(self, name: str) -> "Folder":
        return Folder(f"{self.uri}/{name}")

    def uri_of(self, name: str) -> str:
        """Return the URI of an object in this folder."""
        return f"{self.uri}/{name}"

    def put(self, name: str, data: bytes, *, create: bool = False, durable: bool = False) -> File:
        """Write an object whole; with `create` or `durable` (on the disk), raise `AlreadyExists` where there is one."""
        store, key = self._key(name)
        file = File(name, self.uri_of(name), len(data), hashlib.sha256(data).hexdigest())
        if durable and not is_remote(self.uri):
            _create_durably(Path(self.uri) / name, data)
        else:
            mode: Literal["create", "overwrite"] = "create" if create or durable else "overwrite"
            obstore.put(store, key, data, mode=mode, attributes=self._attributes(file.sha256))
        return file

    def _attributes(self, sha256: str) -> dict[str, str] | None:
        return {DIGEST_METADATA: sha256} if is_remote(self.uri) else None  # a local disk has no place for it

    def put_json(self, name: str, value: Any, *, create: bool = False, durable: bool = False) -> File:
        """Write a value as JSON with sorted keys."""
        data = json.dumps(value, sort_keys=True, indent=1, allow_nan=False)
        return self.put(name, data.encode(), create=create, durable=durable)

    def get(self, name: str) -> bytes:
        """Read an object whole; raise `FileNotFoundError` where there is none."""
        store, key = self._key(name)
        return bytes(obstore.get(store, key).bytes())

    def get_json(self, name: str) -> Any:
        """Read a JSON object."""
        return json.loads(self.get(name))

    def find_json(self, name: str) -> Any | None:
        """Read a JSON object; None where there is none, or where a power cut left it torn, which is logged."""
        try:
            return self.get_json(name)
        except FileNotFoundError:
            return None
        except ValueError:
            logger.warning("%s is torn (not JSON): it counts as absent", self.uri_of(name))
            return None

    def has(self, name: str) -> bool:
        """Return whether there is such an object."""
        store, key = self._key(name)
        with contextlib.suppress(FileNotFoundError):
            obstore.head(store, key)
            return True
        return False

    def entries(self, prefix: str = "") -> list[Entry]:
        """List all objects below `prefix`, sorted by name."""
        store, key = self._key(prefix)
        base = len(self._key("")[1]) + 1
        found = [
            Entry(item["path"][base:], item["size"], item["last_modified"].timestamp())
            for batch in obstore.list(store, key)
            for item in batch
        ]
        return sorted(found, key=lambda entry: entry.name)

    def children(self) -> list[str]:
        """List the names of the folders directly inside."""
        store, key = self._key("")
        prefixes = obstore.list_with_delimiter(store, key)["common_prefixes"]
        return sorted(prefix.rstrip("/").rsplit("/", 1)[-1] for prefix in prefixes)

    def upload(self, path: Path, name: str) -> File:
        """Stream a local file into the folder; its digest is taken of the bytes that are sent.

        Raises:
            OSError: the file changed meanwhile.
        """
        store, key = self._key(name)
        before = sha256_of(path) if is_remote(self.uri) else ""  # metadata precedes the first byte
        digest, size = hashlib.sha256(), 0
        with (
            path.open("rb") as source,
            obstore.open_writer(store, key, buffer_size=CHUNK_BYTES, attributes=self._attributes(before)) as sink,
        ):
            while chunk := source.read(CHUNK_BYTES):
                digest.update(chunk)
                size += len(chunk)
                sink.write(chunk)
        if before not in ("", digest.hexdigest()):
            problem = f"{path} changed while it was uploaded to {self.uri_of(name)}"
            raise OSError(f"{problem}; write it no more and try again")
        return File(name, self.uri_of(name), size, digest.hexdigest())

    def stream(self, name: str) -> Iterator[bytes]:
        """Read an object in chunks."""
        store, key = self._key(name)
        for chunk in obstore.get(store, key).stream(min_chunk_size=CHUNK_BYTES):
            yield bytes(chunk)

    def digest(self, name: str, watch: Callable[[int], None] | None = None) -> File:
        """Hash an object as the store holds it; raise `FileNotFoundError` where there is none. `watch`: `sha256_of`."""
        sha256, size_bytes = _hash_of(self.stream(name), watch)
        return File(name, self.uri_of(name), size_bytes, sha256)

    def identify(self, name: str) -> File:
        """Return an object's size and digest: as noted when it was written, else by `digest`.

        Raises:
            FileNotFoundError: there is no such object.
        """
        if is_remote(self.uri):
            store, key = self._key(name)
            found = obstore.get(store, key, options={"head": True})
            if noted := found.attributes.get(DIGEST_METADATA):
                return File(name, self.uri_of(name), found.meta["size"], noted)
        return self.digest(name)

    def delete(self, names: list[str]) -> None:
        """Delete objects by name; one that is not there is no error."""
        for name in names:
            store, key = self._key(name)
            with contextlib.suppress(FileNotFoundError):
                obstore.delete(store, key)

    def prune(self) -> None:
        """Remove the empty folders that deleting leaves on a local disk, this one included; object stores have none."""
        root = self.local_path()
        for path in [*sorted(root.rglob("*"), reverse=True), root] if root is not None else []:
            if path.is_dir():
                with contextlib.suppress(OSError):  # not empty, or gone already
                    path.rmdir()

    def local_path(self) -> Path | None:
        """Return the folder's path where it lies on a local disk, else None."""
        return None if is_remote(self.uri) else Path(self.uri)


def sha256_of(path: Path, watch: Callable[[int], None] | None = None) -> str:
    """Hash a local file; `watch` gets the number of bytes of each chunk, and may raise to stop."""
    with path.open("rb") as source:
        return _hash_of(iter(partial(source.read, CHUNK_BYTES), b""), watch)[0]


def _hash_of(chunks: Iterator[bytes], watch: Callable[[int], None] | None) -> tuple[str, int]:
    """Return the sha256 and the number of some bytes."""
    digest, size_bytes = hashlib.sha256(), 0
    for chunk in chunks:
        digest.update(chunk)
        size_bytes += len(chunk)
        if watch is not None:
            watch(len(chunk))
    return digest.hexdigest(), size_bytes


def _create_durably(path: Path, data: bytes) -> None:
    """Create a file that is there whole after a power cut, or not at all; raise `AlreadyExists` where there is one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f"{path.name}#{secrets.randbelow(10**15)}")  # obstore lists no name of this form
    try:
        with staged.open("xb") as sink:
            sink.write(data)
            sink.flush()
            os.fsync(sink.fileno())
        os.link(staged, path)
    except FileExistsError as error:
        raise AlreadyExists(f"{path} exists already") from error
    finally:
        staged.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # file systems that cannot sync a folder do it by themselves
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def _fetch_from_hub(uri: str) -> Path:
    """Download `hf://<repo_id>@<commit>/<file>` into the hub's own cache, which checks what it downloads."""
    from huggingface_hub import hf_hub_download

    repo_id, _, rest = uri.removeprefix("hf://").partition("@")
    revision, _, name = rest.partition("/")
    return Path(hf_hub_download(repo_id, name, revision=revision))


def fetch(file: File, folder: Path) -> Path:
    """Return a local path of a file: where it lies, or a download to `folder / file.name`, checked by its digest.

    Raises:
        StageFailed: the downloaded bytes are not those that the manifest names.
    """
    if not is_remote(file.uri):
        return Path(file.uri)
    if file.uri.startswith("hf://"):
        return _fetch_from_hub(file.uri)
    target = folder / file.name
    if target.exists() and target.stat().st_size == file.size_bytes:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    parent, _, name = file.uri.rpartition("/")
    digest = hashlib.sha256()
    with tempfile.NamedTemporaryFile(dir=target.parent, prefix=".fetch-", delete=False) as sink:
        for chunk in Folder(parent).stream(name):
            digest.update(chunk)
            sink.write(chunk)
    if digest.hexdigest() != file.sha256:
        os.unlink(sink.name)
        problem = f"{file.uri} has sha256 {digest.hexdigest()[:12]}…, expected {file.sha256[:12]}…"
        raise StageFailed(f"{problem}; run `stillhouse artifacts verify`")
    os.replace(sink.name, target)
    return target
