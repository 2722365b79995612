"""What a step's process does around its stage."""

import logging
from pathlib import Path

import pytest

from stages.contract import Context, Outcome, Resources, Stage
from stages.storage import Folder
from workflows.engine.executor import Attempt, AttemptResult
from workflows.engine.failures import Failure
from workflows.engine.worker import ProgressCollector, run_attempt

URI = "postgresql://mlflow:correct-horse@db:5432/mlflow"


class Talking(Stage):
    """Says where MLflow is, in every way, and then fails or not."""

    KIND = "dataset"
    REVISION = "2026-11-25 first"
    fails: bool = False

    def run(self, context: Context) -> Outcome:
        print("printed", URI)
        logging.getLogger("talking").warning("logged %s with token %s", URI, "hf_abcdefghijklmnopqrst")
        logging.getLogger("talking").warning("of the environment: %s", "a-very-secret-value")
        if self.fails:
            raise OSError(f"cannot connect to {URI}")
        context.out.put("x.txt", b"x")
        return Outcome()


def attempt(store: Folder, stage: Stage) -> Attempt:
    root = store / "artifacts" / "f"
    return Attempt(
        step="talk",
        attempt=1,
        stage=stage,
        fingerprint="f",
        inputs={},
        out=root / "out" / "000001",
        resume=root / "resume" / "000001" / "i",
        logs=store / "runs" / "r" / "logs",
        resources=Resources(),
    )


@pytest.mark.parametrize("fails", [False, True], ids=["ends well", "fails"])
@pytest.mark.parametrize("where", ["local", "s3"])
def test_run_attempt_keeps_no_secret_in_its_log(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, fails: bool
) -> None:
    monkeypatch.setenv("STILLHOUSE_TEST_TOKEN", "a-very-secret-value")
    store = Folder.at(tmp_path if where == "local" else f"{request.getfixturevalue('s3')}/{tmp_path.name}{fails}")
    result = run_attempt(attempt(store, Talking(fails=fails)), ProgressCollector())
    assert isinstance(result, Failure if fails else AttemptResult)
    text = store.get("runs/r/logs/talk.1.log").decode()
    for secret in ("correct-horse", "hf_abcdefghijklmnopqrst", "a-very-secret-value"):
        assert secret not in text
    assert text.count("postgresql://***@db:5432/mlflow") >= 2 + fails
    assert ("Traceback" in text) == fails
