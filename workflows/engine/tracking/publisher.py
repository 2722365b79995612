"""Tells MLflow what is journaled: as the process beside a driver, or when the next run finds a journal unfinished.

Promises: whatever is journaled reaches MLflow exactly once, whenever driver, teller or server die: a journal has one
sender at a time, each MLflow run bears a key that is searched before it is made, and points are told again with their
first time. Does not: decide what is recorded.
"""

import json
import logging
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from typing import Any

from stages.errors import ConfigError
from stages.storage import Folder
from workflows.engine.heartbeat import Liveness
from workflows.engine.lease import Lease, holder_of
from workflows.engine.redaction import redacted
from workflows.engine.tracking.connection import Connection, connect
from workflows.engine.tracking.journal import Journal, unfinished
from workflows.engine.tracking.mlflow_store import MlflowStore
from workflows.engine.tracking.sender import Sender, follow

__all__ = ["replay"]

logger = logging.getLogger(__name__)

Connect = Callable[[str, str], Connection]


def replay(runs: Folder, *, tracking_uri: str, artifact_root: str, connect: Connect = connect) -> int:
    """Send the journals of earlier runs that MLflow does not have wholly, and end what dead runs left RUNNING.

    Journals that a living process sends are left to it. Where MLflow cannot be reached they wait on, with one warning.

    Args:
        runs: the store's folder of runs.
        tracking_uri: MLflow's, absolute.
        artifact_root: where MLflow's artifacts lie where no server keeps them.
        connect: connects to a tracking URI with an artifact root.

    Returns:
        How many records were sent.

    Raises:
        ConfigError: the tracking URI is none that the ledger can use.
    """
    connection: Connection | None = None
    num_sent, liveness = 0, Liveness(runs)

    def books() -> MlflowStore:
        nonlocal connection
        connection = connection or connect(tracking_uri, artifact_root)
        return MlflowStore(connection, careful=True)

    for run, journal in unfinished(runs):
        term = journal.sender.acquire(holder_of(run, os.getpid())) if journal.numbers() else None
        if not isinstance(term, int):
            continue
        sender = Sender(run, journal, books, _turn_of(runs, run))
        try:
            if liveness.run_alive(run):  # its driver journals on, though its own teller died
                sender.catch_up()
            else:
                sender.finish()
        except ConfigError:
            raise
        except Exception as error:  # noqa: BLE001  MLflow must not keep a run from starting
            shown = redacted(tracking_uri), redacted(str(error))
            logger.warning("MLflow at %s cannot be written (%s); journals of earlier runs wait on", *shown)
            break
        finally:
            num_sent += sender.num_sent
            journal.sender.release(term)
    return num_sent


def _turn_of(runs: Folder, run: str) -> Callable[[], AbstractContextManager[object]]:
    """Return what makes a process wait for its turn to tell MLflow of what the runs of one store share."""
    lease = Lease(Folder(runs.uri.rpartition("/")[0]) / "mlflow" / "turns", Liveness(runs))
    return lambda: lease.held(holder_of(run, os.getpid()))


class _Passed(logging.Handler):
    """Passes warnings on to the driver, whose log they belong in."""

    def emit(self, record: logging.LogRecord) -> None:
        _answer({"warning": record.getMessage()})


def _answer(value: Mapping[str, Any]) -> None:
    with suppress(OSError):  # a driver that was killed does not listen
        sys.stdout.write(json.dumps(value) + "\n")
        sys.stdout.flush()


def main(tracking_uri: str, artifact_root: str, runs: str, run: str) -> None:
    """Be the process that sends one run's journal as it grows."""
    logging.basicConfig(level=logging.WARNING, handlers=[_Passed()])
    journal, turn = Journal(Folder(runs) / run / "ledger"), _turn_of(Folder(runs), run)
    follow(Sender(run, journal, lambda: MlflowStore(connect(tracking_uri, artifact_root)), turn), sys.stdin, _answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
