"""Candidates and the registry's fingerprints, read back."""

from pathlib import Path

import pytest

from tests.workflows.engine.tracking.nights import candidate, judged, started
from tests.workflows.engine.tracking.place import Place, free_port
from workflows.engine.tracking.queries import query_candidates, registered_fingerprints
from workflows.engine.tracking.tracking_uri import TrackingUnavailable, default_tracking_uri


def test_read_candidates_dead_places_are_unavailable(tmp_path: Path) -> None:
    for uri in (default_tracking_uri(str(tmp_path)), f"http://127.0.0.1:{free_port()}"):
        with pytest.raises(TrackingUnavailable):
            query_candidates(uri)
        with pytest.raises(TrackingUnavailable):
            registered_fingerprints(uri)
    assert list(tmp_path.iterdir()) == []


def test_registered_fingerprints_scores_and_models_of_every_version(sqlite: Place) -> None:
    sqlite.publish("o", [started("o")])
    assert registered_fingerprints(sqlite.uri) == set()
    sqlite.publish("a", [started("a"), judged(candidate("student"), at_ms=1000, champion="student")])
    other = [started("b"), judged(candidate("teacher"), at_ms=2000, champion="teacher", scores="6" * 64)]
    sqlite.publish("b", other)
    assert registered_fingerprints(sqlite.uri) == {"0" * 64, "1" * 64, "5" * 64, "6" * 64}


def test_connect_database_that_mlflow_refuses_is_unavailable(sqlite: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    def refuse(*_: object) -> None:
        raise RuntimeError("the schema is that of a newer version")

    sqlite.publish("o", [started("o")])
    monkeypatch.setattr(mlflow, "MlflowClient", refuse)
    with pytest.raises(TrackingUnavailable, match="newer version"):
        query_candidates(sqlite.uri)
