"""Where MLflow is, which tracking URIs are refused, and which ones a store remembers."""

from pathlib import Path

import pytest

from stages.errors import ConfigError
from stages.storage import Folder
from workflows.engine.tracking.tracking_uri import (
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
    for uri in (server_uri, "sqlite:////data/mlflow.db", "postgresql+psycopg2://u:p@db/mlflow"):
        check_tracking_uri(uri)


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
