"""Publishes runs' events to MLflow: as the process beside a driver, for earlier runs behind its work, or on command.

All three are one path: read a run's events from the store, fold them, upsert the view.
Promises: whatever is in the store reaches MLflow exactly once, whenever driver, publisher or server die: a run has one
publisher at a time, and what is published again changes nothing. A run whose driver died is shown as KILLED. Earlier
runs are published by a thread beside it: one that fails holds up no other, and none of them this one's end.
Does not: decide what is recorded.
"""

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from stages.errors import ConfigError
from stages.storage import AlreadyExists, Folder
from workflows.engine.events import READS_AT_ONCE, EventLog, RunEvent
from workflows.engine.heartbeat import Holder, Liveness
from workflows.engine.lease import Lease
from workflows.engine.redaction import redacted
from workflows.engine.retrying import attempt_once, brief
from workflows.engine.tracking.champion import champion_stays
from workflows.engine.tracking.connection import connect
from workflows.engine.tracking.mlflow_store import MlflowStore
from workflows.engine.tracking.tracking_uri import TrackingUnavailable, check_tracking_uri
from workflows.engine.tracking.view import fold

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0
"""How long events gather in the store before they are published together."""
SHARE_OF_TIME = 0.2
"""Of one core: what folding a run of very many events anew each time may take."""
PAUSES_SECONDS = (POLL_SECONDS, 1.0, 2.0, 5.0, 15.0, 60.0)
"""Pauses after no, one, two, … failures in a row while the run goes on."""
CLOSING_TRIES = 3
CLOSING_PAUSE_SECONDS = 1.0
"""Tries, and the pause between them, once the run is over: longer outages are for a later run's publisher."""
WORK_GOES_ON = "MLflow cannot be written (%s); work goes on, and the store keeps the events"
PUBLISHED = "published.json"
"""Object of a run that is over and wholly in MLflow: nothing is left to do for it."""


def publisher_lease(runs: Folder, run: str, liveness: Liveness) -> Lease:
    """Return the lease of whoever publishes a run."""
    return Lease(runs / run / "publisher", liveness)


def mlflow_store(runs: Folder, run: str, tracking_uri: str, connect: Callable[[str], Any] = connect) -> MlflowStore:
    """Return MLflow as a process that acts for a run publishes to it; nothing is connected yet."""
    store = Folder(runs.uri.rpartition("/")[0])
    shared = Lease(store / "mlflow" / "shared", Liveness(runs))
    holding = partial(shared.held, Holder.of_this_process(run))
    defended = partial(champion_stays, store.uri)
    return MlflowStore(tracking_uri, store.uri_of("mlflow/artifacts"), connect, holding, defended)


@dataclass(frozen=True, slots=True)
class Publication:
    """What came of publishing a run."""

    run: str
    state: Literal["over", "running", "empty", "held", "failed"]
    """Published, and over or not; or it has no events, another process publishes it at this moment, or it failed."""
    error: str = ""

    @property
    def published(self) -> bool:
        """Return whether MLflow has all that there is of the run."""
        return self.state in ("over", "running")


def publish_runs(runs: Folder, names: Iterable[str], store: MlflowStore) -> Iterator[Publication]:
    """Publish all that there is of some runs, one after another; one that fails holds up no other.

    Raises:
        ConfigError: the tracking URI is none that can be used.
        TrackingUnavailable: MLflow cannot be reached.
    """
    liveness = Liveness(runs)
    for run in names:
        try:
            yield _publish_run(runs, run, store, liveness)
        except (ConfigError, TrackingUnavailable):
            raise
        except Exception as error:  # noqa: BLE001  of MLflow or the store, and perhaps for this run alone
            check_tracking_uri(store.uri)
            yield Publication(run, "failed", redacted(brief(error)))


def _publish_run(runs: Folder, run: str, store: MlflowStore, liveness: Liveness) -> Publication:
    log, lease = EventLog(runs / run / "events"), publisher_lease(runs, run, liveness)
    if not log.has_events():
        return Publication(run, "empty")
    term = lease.acquire(Holder.of_this_process(run))
    if isinstance(term, Holder):
        return Publication(run, "held")
    try:
        over = not liveness.run_alive(run)  # else its driver goes on, though its own publisher died
        try:
            view = fold(log.read_all(), over=over)
        except ValueError as error:
            logger.warning("run %s cannot be published: %s", run, error)
        else:
            store.publish(view)
        return Publication(run, "over" if over else "running")
    finally:
        lease.release(term)


def publish_earlier(runs: Folder, store: MlflowStore, run: str = "") -> list[str]:
    """Publish the runs, but for one, that are not wholly in MLflow, oldest first; return those that were.

    Raises:
        TrackingUnavailable: MLflow cannot be reached.
    """
    names = sorted(set(runs.children()) - {run})
    with ThreadPoolExecutor(READS_AT_ONCE) as pool:
        done = pool.map(lambda name: (runs / name).has(PUBLISHED), names)
        waiting = [name for name, is_done in zip(names, done, strict=True) if not is_done]
    published, failed = [], []
    for found in publish_runs(runs, waiting, store):
        if found.state == "over":
            attempt_once(f"mark run {found.run} as published", partial(mark_published, runs, found.run))
        if found.published:
            published.append(found.run)
        elif found.error:
            failed.append(f"{found.run} ({found.error})")
    if failed:
        logger.warning("earlier runs could not be published, and a later run tries again: %s", ", ".join(failed))
    return published


def mark_published(runs: Folder, run: str) -> None:
    """Note that nothing is left to do for a run, ever."""
    with suppress(AlreadyExists):
        (runs / run).put_json(PUBLISHED, {}, create=True)


def follow(run: str, runs: Folder, store: MlflowStore, over: threading.Event) -> str | None:
    """Publish a run, held by this process, as its events come, until `over` is set; then try a few times more.

    Returns:
        Why MLflow lacks something in the end, or None.
    """
    log, events = EventLog(runs / run / "events"), list[RunEvent]()
    num_sent = failures = tries = 0
    pause = POLL_SECONDS
    while True:
        ended, fold_seconds, error = over.wait(pause), 0.0, None
        try:
            events += log.read_new()
            if len(events) > num_sent or (ended and events):
                began = time.monotonic()
                view = fold(events, over=ended)
                fold_seconds = time.monotonic() - began
                store.publish(view)
                num_sent = len(events)
            if ended and events:
                mark_published(runs, run)
        except Exception as caught:  # noqa: BLE001  the border of the publisher's process: the store keeps everything
            error = redacted(str(caught)) or type(caught).__name__
        if error and not failures:
            logger.warning(WORK_GOES_ON, error)
        failures = failures + 1 if error else 0
        tries += ended
        if ended and (not error or tries == CLOSING_TRIES):
            return error
        if ended:
            time.sleep(CLOSING_PAUSE_SECONDS)
        pause = max(PAUSES_SECONDS[min(failures, len(PAUSES_SECONDS) - 1)], fold_seconds / SHARE_OF_TIME)


class _Forwarding(logging.Handler):
    """Passes warnings on to the driver, in whose log they belong: one JSON string a line."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):  # a driver that is gone does not listen
            print(json.dumps(record.getMessage()), flush=True)  # noqa: T201


def main(runs_uri: str, run: str) -> None:
    """Be the process beside a driver: standard input gives the tracking URI, and ends with the driver.

    Standard output ends once the run is in MLflow or given up, for which the driver waits.
    """
    logging.basicConfig(level=logging.WARNING, handlers=[_Forwarding()])
    tracking_uri, over, runs = sys.stdin.readline().rstrip("\n"), threading.Event(), Folder(runs_uri)

    def wait_for_driver() -> None:
        sys.stdin.read()
        over.set()

    def sweep() -> None:
        with suppress(Exception):  # out of reach: they wait for a later sweep
            publish_earlier(runs, mlflow_store(runs, run, tracking_uri), run)

    behind = threading.Thread(target=sweep, name="earlier", daemon=True)
    threading.Thread(target=wait_for_driver, name="driver", daemon=True).start()
    behind.start()
    with publisher_lease(runs, run, Liveness(runs)).held(Holder.of_this_process(run)):
        error = follow(run, runs, mlflow_store(runs, run, tracking_uri), over)
    if error:
        sys.exit(error)  # which the driver reads and shows
    sys.stdout.flush()
    for descriptor in (1, 2):  # the driver need not wait for what follows
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    behind.join()
    sweep()


if __name__ == "__main__":
    main(*sys.argv[1:])
