"""Where MLflow is: the default tracking URI, whether one can be used, and which ones a store was used with; no MLflow.

Promises: a URI that MLflow would misread or that would leave files in the current folder is refused before any work; a
server that does not answer is found out within seconds; what a store remembers of a URI has no user and no password.
"""

import hashlib
import os
import socket
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import psutil

from stages.errors import ConfigError, StillhouseError
from stages.storage import Folder, is_remote
from workflows.engine.redaction import redacted

CONNECT_SECONDS = 2.0
"""How long a tracking server may take to accept a TCP connection; MLflow itself would try for minutes."""
DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
NETWORK_FILESYSTEMS = ("nfs", "cifs", "smb", "lustre", "gpfs", "ceph", "fuse", "9p", "beegfs")
"""SQLite's write-ahead log needs memory shared between its users, which these do not give."""


class TrackingUnavailable(StillhouseError):
    """MLflow cannot be asked."""


def default_tracking_uri(store: str) -> str:
    """Return the URI of a sqlite file inside a store on a local disk.

    Raises:
        ConfigError: the store is in an object store, where SQLite cannot work.
    """
    root = Folder.at(store)
    if is_remote(root.uri):
        raise ConfigError(
            f"the store {redacted(store)!r} cannot hold MLflow's sqlite file; pass a tracking URI (http://…, or sqlite:////path/to/file.db)"
        )
    return f"sqlite:///{root.uri}/mlflow/mlflow.db"


def is_server(uri: str) -> bool:
    """Return whether a tracking URI is that of an MLflow server."""
    return uri.startswith(("http://", "https://"))


def sqlite_path(uri: str) -> Path | None:
    """Return the file that a sqlite URI names, else None."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def without_userinfo(uri: str) -> str:
    """Return a URI without user and password, and with other secrets in it hidden."""
    parts = urlsplit(uri)
    return redacted(urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])) if parts.netloc else uri)


def remember_tracking_uri(root: Folder, uri: str) -> None:
    """Keep in a store that a run of it went to a tracking URI; the file inside of the store itself need not be kept."""
    if is_remote(root.uri) or uri != default_tracking_uri(root.uri):
        shown = without_userinfo(uri)
        name = f"{hashlib.sha256(shown.encode()).hexdigest()[:16]}.json"
        (root / "mlflow" / "known").put_json(name, {"tracking_uri": shown})


def known_tracking_uris(root: Folder) -> list[str]:
    """Return the tracking URIs that a store was used with, without user and password; the store's own file first."""
    has_own = not is_remote(root.uri) and root.has("mlflow/mlflow.db")
    known = root / "mlflow" / "known"
    found = [value["tracking_uri"] for entry in known.entries() if (value := known.find_json(entry.name))]
    return [*([default_tracking_uri(root.uri)] if has_own else []), *sorted(found)]


def check_tracking_uri(uri: str) -> None:
    """Check that a tracking URI is one to use and, of a server or a database, that something listens there.

    Nobody logs in.

    Raises:
        ConfigError: the URI is none that can be used, or there is no driver for its database.
        TrackingUnavailable: nothing listens at its address.
    """
    path = sqlite_path(uri)
    if path is not None:
        if not path.is_absolute():
            raise ConfigError(
                f"the tracking URI {uri!r} is relative to the current folder; write sqlite:///{path.absolute()}"
            )
        return
    address, kind = urlsplit(uri), uri.partition("://")[0].partition("+")[0]
    if kind in DATABASE_PORTS:
        from sqlalchemy import make_url
        from sqlalchemy.exc import SQLAlchemyError

        try:
            make_url(uri).get_dialect().import_dbapi()
        except (SQLAlchemyError, ValueError) as error:
            raise ConfigError(f"the tracking URI {redacted(uri)} is no database's ({redacted(str(error))})") from error
        except ImportError as error:
            problem = f"{redacted(uri)} needs a driver that is not installed: pip install {error.name}"
            raise ConfigError(problem) from error
    elif not is_server(uri) or not address.hostname:
        raise ConfigError(
            f"the tracking URI {redacted(uri)!r} is none that can be used; expected http(s)://host:port or sqlite:////path/to/file.db"
        )
    if not address.hostname:
        return  # a database's socket, which its driver finds
    port = address.port or (DATABASE_PORTS | {"http": 80, "https": 443})[kind]
    try:
        socket.create_connection((address.hostname, port), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        what = "MLflow server" if is_server(uri) else "database"
        raise TrackingUnavailable(f"no {what} answers at {address.hostname}:{port} ({error})") from error


def is_on_network(path: Path) -> bool:
    """Return whether a path's filesystem is one that several hosts mount."""
    mounts = [p for p in psutil.disk_partitions(all=True) if os.path.commonpath([p.mountpoint, path]) == p.mountpoint]
    nearest = max(mounts, key=lambda mount: len(mount.mountpoint), default=None)
    return nearest is not None and nearest.fstype.lower().startswith(NETWORK_FILESYSTEMS)
