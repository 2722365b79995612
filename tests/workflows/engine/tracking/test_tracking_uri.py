"""Where MLflow is, which tracking URIs are refused, and which ones a store remembers."""

import sys
import types
from pathlib import Path

import pytest

from stages.errors import ConfigError
from stages.storage import Folder
from workflows.engine.tracking.tracking_uri import (
    TrackingUnavailable,
    check_tracking_uri,
    default_tracking_uri,
    known_tracking_uris,
    remember_tracking_uri,
    without_userinfo,
)


@pytest.mark.parametrize(
    "uri", ["sqlite:///mlflow.db", "./mlruns", "file:///tmp/mlruns", "databricks", "http://", "s3://b/x"]
)
def test_check_tracking_uri_unusable_is_a_config_error(uri: str) -> None:
    with pytest.raises(ConfigError, match="tracking URI"):
        check_tracking_uri(uri)


@pytest.mark.server
def test_check_tracking_uri_usable_says_nothing(server_uri: str) -> None:
    for uri in (server_uri, "sqlite:////data/mlflow.db"):
        check_tracking_uri(uri)


def test_check_tracking_uri_of_a_database_without_driver_or_listener_says_which() -> None:
    with pytest.raises(ConfigError, match=r"postgresql\+psycopg2://.* needs a driver .*: pip install psycopg2"):
        check_tracking_uri("postgresql+psycopg2://u:p@db/mlflow")
    with pytest.raises(ConfigError, match=r"is no database's"):
        check_tracking_uri("postgresql+nodriver://u:p@db/mlflow")


def test_check_tracking_uri_of_a_database_that_does_not_listen_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg2", types.SimpleNamespace(paramstyle="pyformat"))
    with pytest.raises(TrackingUnavailable, match=r"no database answers at 127.0.0.1:1 "):
        check_tracking_uri("postgresql+psycopg2://u:p@127.0.0.1:1/mlflow")


def test_default_tracking_uri_is_inside_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert default_tracking_uri("./.stillhouse") == f"sqlite:///{tmp_path}/.stillhouse/mlflow/mlflow.db"
    with pytest.raises(ConfigError, match="tracking URI"):
        default_tracking_uri("s3://bucket/store")


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("http://me:hunter2@mlflow:5000/x", "http://mlflow:5000/x"),
        ("http://mlflow:5000", "http://mlflow:5000"),
        ("postgresql+psycopg2://u:p@db/mlflow?password=hunter2", "postgresql+psycopg2://db/mlflow?password=***"),
        ("sqlite:////data/mlflow.db", "sqlite:////data/mlflow.db"),
    ],
)
def test_without_userinfo_keeps_the_rest(uri: str, shown: str) -> None:
    assert without_userinfo(uri) == shown


def test_known_tracking_uris_each_once_and_without_secrets(tmp_path: Path) -> None:
    root = Folder.at(tmp_path)
    assert known_tracking_uris(root) == []
    own = default_tracking_uri(root.uri)
    for uri in (own, "http://me:hunter2@mlflow:5000", "http://you@mlflow:5000", "sqlite:////data/mlflow.db"):
        remember_tracking_uri(root, uri)
    assert known_tracking_uris(root) == ["http://mlflow:5000", "sqlite:////data/mlflow.db"]
    (tmp_path / "mlflow" / "mlflow.db").touch()
    assert known_tracking_uris(root)[0] == own
    assert not any(b"hunter2" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
