"""Where MLflow is, which tracking URIs are refused, and which ones a store remembers."""

import sys
import types
from pathlib import Path

import pytest

from stages.errors import ConfigError
from stages.storage import Folder
from tests.mlflow_stub import USER_LOGIN, mlflow_stub
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


@pytest.mark.parametrize("status", [401, 403])
def test_check_tracking_uri_of_a_server_that_does_not_let_us_in_says_what_to_set(status: int) -> None:
    said = rf"answered {status} to GET /api.* with no credentials: You are not authenticated.*MLFLOW_TRACKING_USERNAME"
    with mlflow_stub(login=USER_LOGIN, status=status) as uri:
        with pytest.raises(TrackingUnavailable, match=said) as of_experiment:
            check_tracking_uri(uri, "flow/model")
        with pytest.raises(TrackingUnavailable) as of_any:
            check_tracking_uri(uri)
    assert str(of_experiment.value) == str(of_any.value)  # so that driver and publisher do not both tell it


def test_check_tracking_uri_with_wrong_credentials_says_so_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "old-token")
    with mlflow_stub(login=USER_LOGIN) as uri, pytest.raises(TrackingUnavailable, match="with Bearer creden") as caught:
        check_tracking_uri(f"{uri}/")
    assert "old-token" not in str(caught.value)


@pytest.mark.parametrize("way", ["variables", "token", "file", "uri"])
def test_check_tracking_uri_logs_in_as_mlflow_does(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    login = "Bearer of-good-news" if way == "token" else USER_LOGIN
    monkeypatch.setenv("HOME", str(tmp_path))
    with mlflow_stub(login=login) as uri:
        if way == "variables":
            monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "reader")
            monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2hunter2")
        elif way == "token":
            monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "of-good-news")
        elif way == "file":
            (tmp_path / ".mlflow").mkdir()
            text = "[mlflow]\nmlflow_tracking_username = reader\nmlflow_tracking_password = hunter2hunter2\n"
            (tmp_path / ".mlflow" / "credentials").write_text(text)
        else:
            uri = uri.replace("//", "//reader:hunter2hunter2@")
        assert check_tracking_uri(uri) == ""


def test_check_tracking_uri_that_answers_with_a_login_page_is_unavailable() -> None:
    with mlflow_stub(page=b"<html>Sign in") as uri, pytest.raises(TrackingUnavailable, match="not answer as MLflow"):
        check_tracking_uri(uri)


@pytest.mark.parametrize(
    ("location", "takes_files"),
    [
        ("mlflow-artifacts:/3", True),
        ("s3://bucket/3", True),
        ("file:///srv/mlruns/3", False),
        ("/srv/mlruns/3", False),
        ("C:\\mlruns\\3", False),
    ],
)
def test_check_tracking_uri_tells_where_a_server_keeps_files_that_only_it_can_write(
    location: str, takes_files: bool
) -> None:
    with mlflow_stub(locations={"newest": location}) as uri:
        told = check_tracking_uri(uri)
        assert told == check_tracking_uri(uri, "one/that is not there")
    assert ("--serve-artifacts" in told) is not takes_files


def test_check_tracking_uri_asks_where_the_experiment_itself_has_its_files() -> None:
    with mlflow_stub(locations={"newest": "/srv/mlruns/2", "flow/a & b": "mlflow-artifacts:/1"}) as uri:
        assert check_tracking_uri(uri, "flow/a & b") == ""
        assert "at /srv/mlruns," in check_tracking_uri(uri)


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
