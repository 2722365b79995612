"""Where MLflow is: the default tracking URI, whether one can be used, and which ones a store was used with; no MLflow.

Promises: a URI that MLflow would misread or that would leave files in the current folder is refused before any work; a
server that does not answer, or does not let us in, is found out within seconds; what a store remembers of a URI has no
user and no password.
"""

import base64
import configparser
import hashlib
import os
import socket
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

import psutil

from stages.errors import ConfigError, StillhouseError
from stages.storage import Folder, is_remote
from workflows.engine.redaction import redacted

CONNECT_SECONDS = 2.0
"""How long a tracking server may take to accept a TCP connection; MLflow itself would try for minutes."""
LOGIN = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
REMEDY = "set {} and {}, or {}, of one who may write; a host that is refused needs --allowed-hosts".format(*LOGIN)
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


def check_tracking_uri(uri: str, experiment: str = "") -> str:
    """Check that a tracking URI is one to use, that a server or a database listens there, and that a server lets us in.

    Returns:
        Why a server gets no files of an experiment, or "".

    Raises:
        ConfigError: the URI is none that can be used, or there is no driver for its database.
        TrackingUnavailable: nothing listens at its address, or what does is no MLflow server that takes our requests.
    """
    path = sqlite_path(uri)
    if path is not None:
        if not path.is_absolute():
            raise ConfigError(
                f"the tracking URI {uri!r} is relative to the current folder; write sqlite:///{path.absolute()}"
            )
        return ""
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
        return ""  # a database's socket, which its driver finds
    port = address.port or (DATABASE_PORTS | {"http": 80, "https": 443})[kind]
    try:
        socket.create_connection((address.hostname, port), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        what = "MLflow server" if is_server(uri) else "database"
        raise TrackingUnavailable(f"no {what} answers at {address.hostname}:{port} ({error})") from error
    return _ask_server(uri, experiment) if is_server(uri) else ""


def _ask_server(uri: str, experiment: str) -> str:
    """Ask a server where an experiment, or else its newest one, has its artifacts, and return what follows of it."""
    import requests  # MLflow's own: 70 ms

    if os.environ.get("MLFLOW_TRACKING_AUTH") or os.environ.get("MLFLOW_TRACKING_AWS_SIGV4"):
        return ""  # MLflow alone can sign these requests
    server, api = f"the MLflow server at {without_userinfo(uri)}", "/api/2.0/mlflow/experiments/"
    try:
        for path in [f"get-by-name?experiment_name={quote(experiment)}"] * bool(experiment) + ["search?max_results=1"]:
            got = requests.get(uri.rstrip("/") + api + path, timeout=CONNECT_SECONDS, **_login())
            if got.status_code != requests.codes.not_found:
                break
        if got.ok:
            found = got.json()
            newest, *_ = [found["experiment"]] if "experiment" in found else found.get("experiments") or [{}]
            return files_left_out(newest.get("artifact_location", "mlflow-artifacts:/"))
    except requests.Timeout:
        return ""  # it takes connections; MLflow's own requests wait longer
    except (OSError, ValueError, LookupError, AttributeError, configparser.Error) as error:
        problem = f"{server} does not answer as MLflow does: {redacted(str(error))}"
        remedy = "is it a login page, or has it a certificate to trust by MLFLOW_TRACKING_SERVER_CERT_PATH?"
        raise TrackingUnavailable(f"{problem}; {remedy}") from error
    login = str(got.request.headers.get("Authorization", "no")).partition(" ")[0]
    problem = f"{server} answered {got.status_code} to GET {api}… with {login} credentials"
    remedy = REMEDY if got.status_code in (401, 403) else "expected what an MLflow server says"
    raise TrackingUnavailable(f"{problem}: {redacted(got.text[:200].strip())}; {remedy}")


def _login() -> dict[str, Any]:
    """Return the arguments of a request with which MLflow's client logs in, by its variables and its file."""
    given, file = os.environ.get, configparser.ConfigParser()
    file.read(Path("~/.mlflow/credentials").expanduser())
    user, password = (given(name) or file.get("mlflow", name, fallback=None) for name in LOGIN[:2])
    login = f"Bearer {given(LOGIN[2])}" if given(LOGIN[2]) else None
    if user and password:
        login = "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
    insecure = given("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("true", "1")
    verify, cert = given("MLFLOW_TRACKING_SERVER_CERT_PATH", not insecure), given("MLFLOW_TRACKING_CLIENT_CERT_PATH")
    return {"headers": {"Authorization": login}, "verify": verify, "cert": cert}


def files_left_out(location: str) -> str:
    """Return why no file can be sent to an experiment whose artifacts a server has at a location; "" if one can."""
    scheme = urlsplit(location).scheme
    if scheme != "file" and len(scheme) > 1:  # one letter: a drive of Windows
        return ""
    return (
        f"MLflow gets no files, since its server keeps them at {location.rpartition('/')[0]}, a path of its own disk; "
        "it needs --serve-artifacts and --artifacts-destination (an experiment that it has already keeps its place)"
    )


def is_on_network(path: Path) -> bool:
    """Return whether a path's filesystem is one that several hosts mount."""
    mounts = [p for p in psutil.disk_partitions(all=True) if os.path.commonpath([p.mountpoint, path]) == p.mountpoint]
    nearest = max(mounts, key=lambda mount: len(mount.mountpoint), default=None)
    return nearest is not None and nearest.fstype.lower().startswith(NETWORK_FILESYSTEMS)
