"""Fixtures of the stages' tests."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, so that none reads or fills the user's."""
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
