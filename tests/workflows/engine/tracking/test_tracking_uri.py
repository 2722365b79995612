"""Where the ledger is, and which tracking URIs are refused."""

from pathlib import Path

import pytest

from stages.errors import ConfigError
from workflows.engine.tracking.tracking_uri import check_tracking_uri, default_tracking_uri


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
