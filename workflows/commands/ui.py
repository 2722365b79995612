"""`stillhouse ui`: the MLflow UI on the store's tracking database."""

import os
import socket
import sys

from stages.errors import ConfigError
from workflows.commands.options import DEFAULT_STORE, Port, Store, TrackingUri
from workflows.commands.output import say
from workflows.engine.redaction import redacted
from workflows.engine.run import Settings
from workflows.engine.store import ArtifactStore
from workflows.engine.tracking.queries import query_candidates
from workflows.engine.tracking.tracking_uri import is_server, sqlite_path
from workflows.engine.tracking.ui_view import CANDIDATES_PATH

QUIET = {"MLFLOW_LOGGING_LEVEL": "WARNING", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "PYTHONWARNINGS": "ignore"}
"""The server's runner of jobs, of which stillhouse has none, would be eight more processes of 240 MB each."""


def ui(*, store: Store = DEFAULT_STORE, tracking_uri: TrackingUri = None, port: Port = 5000) -> None:
    """Serve the MLflow UI on the store's tracking database, on this machine only.

    Args:
        port: on 127.0.0.1.
    """
    tracking = Settings(store, tracking_uri).tracking(ArtifactStore(store))
    if is_server(tracking):
        say(f"the tracking server has its own UI: {redacted(tracking)}")
        return
    path = sqlite_path(tracking)
    if path is not None and not path.exists():
        raise ConfigError(
            f"there is no MLflow database at {tracking} yet; run a workflow first, or name its store with --store"
        )
    _check_free(port)
    say("candidates side by side, once the server is up (Ctrl-C ends it):")
    for name, experiment_id in sorted(
        {(row["experiment"], row["experiment_id"]) for row in query_candidates(tracking)}
    ):
        page = f"http://127.0.0.1:{port}/{CANDIDATES_PATH.format(experiment_id=experiment_id)}"
        say(f"  {name}: {page} · charts: {page}&compareRunsMode=CHART")
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    sys.stdout.flush()
    # This process becomes the server, so that whoever stops it stops the server. A URI's password is for no argument.
    os.execve(sys.executable, command, {**os.environ, **QUIET, "MLFLOW_BACKEND_STORE_URI": tracking})


def _check_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ConfigError(
                f"port {port} of 127.0.0.1 cannot be used ({error}); choose another with --port"
            ) from error
