"""What the store and the ledger hold, for the commands that look rather than run."""

import os
import socket
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console

from stages.errors import ConfigError, nearest
from workflows.commands.terminal import duration, fitting_table, size
from workflows.engine.check import check, find_step
from workflows.engine.graph import Workflow
from workflows.engine.identity import Fingerprint, Identity, differences, identities
from workflows.engine.redaction import redacted
from workflows.engine.run import Settings
from workflows.engine.store import ArtifactStore, Commit, reachable
from workflows.engine.tracking.queries import read_candidates, registered_fingerprints
from workflows.engine.tracking.ui_view import CANDIDATES_PATH

COLUMNS = (
    ("final/perplexity", "perplexity", "{:.2f}"),
    ("final/kl_to_teacher", "KL to teacher", "{:.4f}"),
    ("final/agreement", "agreement", "{:.1%}"),
    ("final/size_bytes", "size, MB", "{:.2f}"),
    ("final/compression_x", "compression", "{:.1f}×"),
    ("final/bits_per_weight", "bits/weight", "{:.2f}"),
    ("final/latency_p50_ms", "decode p50, ms", "{:.2f}"),
    ("final/tokens_per_second", "tokens/s", "{:,.0f}"),
    ("final/cost_seconds", "cost, s", "{:,.0f}"),
)
"""The leaderboard out of MLflow: metric, heading, format."""


def _existing(uri: str) -> ArtifactStore:
    """Return the store at a place.

    Raises:
        ConfigError: there is nothing there.
    """
    store = ArtifactStore(uri)
    local = store.root.local_path()
    if local is not None and not local.is_dir():
        raise ConfigError(f"there is no store at {uri!r}; run a workflow first, or name its store with --store")
    return store


def explain(workflow: Workflow, store_uri: str, step: str, *, against: str | None) -> dict[str, Any]:
    """Return what a step's fingerprint is made of, and what differs from its result in another run.

    Raises:
        ConfigError: there is no such step or run, or data from outside is out of reach.
    """
    check(workflow)
    name = find_step(workflow, step).name
    identity = identities(workflow)[name]
    if not isinstance(identity, Identity):
        raise ConfigError(f"the fingerprint of {name} cannot be known: {identity.reason}")
    store = ArtifactStore(store_uri)
    commit = store.newest(identity.fingerprint)
    answer: dict[str, Any] = {"step": name, "fingerprint": identity.fingerprint, **identity.record}
    answer["committed"] = f"generation {commit.generation} by run {commit.manifest.run}" if commit else "no"
    if against:
        steps = _run_steps(store, against)
        if name not in steps:
            raise ConfigError(f"run {against!r} had no step {name!r}{nearest(name, list(steps))}")
        other = store.newest(Fingerprint(steps[name]))
        if steps[name] == identity.fingerprint:
            answer[f"against {against}"] = "the same fingerprint"
        elif other is None:
            answer[f"against {against}"] = f"another fingerprint, {steps[name]}, which has no commit to compare with"
        else:
            answer[f"against {against}"] = differences(other.manifest.identity, identity.record)
    return answer


def _run_steps(store: ArtifactStore, run: str) -> Mapping[str, str]:
    """Return step → fingerprint of a run."""
    runs = store.root / "runs"
    try:
        steps: Mapping[str, str] = (runs / run).get_json("steps.json")
    except FileNotFoundError as error:
        raise ConfigError(f"the store {store.uri} has no run {run!r}{nearest(run, runs.children())}") from error
    return steps


# artifacts ----------------------------------------------------------------------------------------------------------


def _commits(store: ArtifactStore) -> list[Commit]:
    found = (store.newest(Fingerprint(fingerprint)) for fingerprint in store.fingerprints())
    return sorted((commit for commit in found if commit), key=lambda commit: commit.manifest.created)


def _total_bytes(commit: Commit) -> int:
    return sum(file.size_bytes for file in commit.artifact.files)


def list_artifacts(store_uri: str) -> list[dict[str, Any]]:
    """Return a row for each committed artifact, oldest first."""
    store = _existing(store_uri)
    pins = set(store.pins())
    return [
        {
            "fingerprint": commit.fingerprint,
            "kind": commit.artifact.kind,
            "step": f"{commit.manifest.workflow}/{commit.manifest.step}",
            "size_bytes": _total_bytes(commit),
            "seconds": commit.seconds,
            "created": commit.manifest.created,
            "run": commit.manifest.run,
            "generation": commit.generation,
            "pinned": commit.fingerprint in pins,
        }
        for commit in _commits(store)
    ]


def print_artifacts(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the rows of `list_artifacts`."""
    cells = [
        [
            row["step"],
            row["kind"],
            size(row["size_bytes"]),
            duration(row["seconds"]),
            time.strftime("%Y-%m-%d %H:%M", time.localtime(row["created"])),
            row["fingerprint"][:12],
            "pinned" if row["pinned"] else "",
        ]
        for row in rows
    ]
    headings = ("workflow/step", "kind", "size", "took", "made", "fingerprint", "")
    console.print(fitting_table(headings, cells, width=console.width, droppable=("took", "kind", "made")))
    console.print(f"{len(rows)} artifacts, {size(sum(row['size_bytes'] for row in rows))}", highlight=False)


def show(store_uri: str, text: str) -> dict[str, Any]:
    """Return everything about one artifact.

    Raises:
        ConfigError: there is none, or it has no commit.
    """
    store = _existing(store_uri)
    fingerprint = store.resolve(text)
    commit = store.newest(fingerprint)
    if commit is None:
        raise ConfigError(
            f"{fingerprint[:12]} has no commit: {store.withdrawal(fingerprint) or 'its step has not finished yet'}"
        )
    manifest = commit.manifest
    folders = sorted(
        {file.uri.rsplit("/", 1)[0] for file in commit.artifact.files if file.name.endswith("/config.json")}
    )
    return {
        "fingerprint": fingerprint,
        "kind": manifest.kind,
        "step": f"{manifest.workflow}/{manifest.step}",
        "run": manifest.run,
        "generation": commit.generation,
        "load from": "\n".join(folders) or "no checkpoint",
        "size": size(_total_bytes(commit)),
        "took": duration(commit.seconds),
        "peak memory": size(manifest.peak_memory_bytes),
        "metrics": dict(manifest.metrics),
        "inputs": {name: part.fingerprint[:12] for name, part in manifest.inputs.items()},
        "provenance": manifest.provenance.model_dump(),
        "files": [
            {"name": file.name, "size_bytes": file.size_bytes, "uri": file.uri} for file in commit.artifact.files
        ],
    }


def verify(store_uri: str, which: Iterable[str]) -> list[dict[str, Any]]:
    """Hash artifacts' files again; withdraw those that do not verify; return a row for each."""
    store = _existing(store_uri)
    chosen = [store.resolve(text) for text in which] or [
        Fingerprint(fingerprint) for fingerprint in store.fingerprints()
    ]
    rows = []
    for fingerprint in chosen:
        commit = store.newest(fingerprint)
        if commit is None:
            continue
        problems = store.problems(commit, deep=True)
        if problems:
            store.withdraw(commit, problems[0])
        rows.append({"fingerprint": fingerprint, "step": commit.manifest.step, "problems": problems})
    return rows


def pin(store_uri: str, text: str, note: str) -> str:
    """Pin an artifact and return its fingerprint."""
    store = _existing(store_uri)
    fingerprint = store.resolve(text)
    store.pin(fingerprint, note)
    return fingerprint


# gc -----------------------------------------------------------------------------------------------------------------


def collect(settings: Settings, *, keep_runs: int, delete: bool) -> dict[str, Any]:
    """Find, and with `delete` remove, what no pinned artifact, kept run or registered version reaches.

    Raises:
        TrackingUnavailable: the registry cannot be asked, so nothing is known to be safe to remove.
    """
    store = _existing(settings.store)
    registered = registered_fingerprints(settings.tracking(store))
    runs = sorted((store.root / "runs").children())
    newest = runs[-keep_runs:] if keep_runs > 0 else []
    kept_runs = [run for run in runs if run in newest or store.liveness.run_alive(run)]
    roots = {*registered, *store.pins()}
    for run in kept_runs:
        if (store.root / "runs" / run).has("steps.json"):
            roots.update(_run_steps(store, run).values())
    known = set(store.fingerprints())
    kept = reachable(store, roots & known)
    rows, freed = [], 0
    for fingerprint in sorted(known - kept):
        if store.held(fingerprint):
            continue
        entries = store.folder(fingerprint).entries()
        num_bytes = sum(entry.size_bytes for entry in entries)
        freed += num_bytes
        commit = store.newest(Fingerprint(fingerprint))
        step = f"{commit.manifest.workflow}/{commit.manifest.step}" if commit else "(unfinished)"
        rows.append({"fingerprint": fingerprint, "step": step, "size_bytes": num_bytes})
        if delete:
            # Commits go first: cut short, this leaves files that nobody reads, never a manifest without files.
            names = sorted((entry.name for entry in entries), key=lambda name: not name.startswith("commits/"))
            store.folder(fingerprint).delete(names)
            store.folder(fingerprint).prune()
    return {
        "collected": rows,
        "size_bytes": freed,
        "kept": len(known & kept),
        "kept_runs": kept_runs,
        "deleted": delete,
    }


def print_collected(console: Console, answer: Mapping[str, Any]) -> None:
    """Print what `collect` returned."""
    for row in answer["collected"]:
        console.print(f"{row['fingerprint'][:12]}  {row['step']}  {size(row['size_bytes'])}", highlight=False)
    verb = "deleted" if answer["deleted"] else "would be deleted (give --yes to do it)"
    console.print(
        f"{len(answer['collected'])} artifacts, {size(answer['size_bytes'])}, {verb}; {answer['kept']} kept",
        highlight=False,
    )


# the ledger ---------------------------------------------------------------------------------------------------------


def compare(settings: Settings, runs: Sequence[str]) -> list[dict[str, Any]]:
    """Return the candidates that MLflow knows, of some runs or of all.

    Raises:
        ConfigError: there is no such run.
        TrackingUnavailable: MLflow cannot be asked.
    """
    store = ArtifactStore(settings.store) if settings.tracking_uri else _existing(settings.store)
    rows = read_candidates(settings.tracking(store), run_ids=list(runs) or None)
    known = {run for row in rows for run in row["runs"]}
    for run in runs:
        if run not in known:
            _run_steps(store, run)  # there is such a run, though it judged no candidate
    return sorted(rows, key=lambda row: (row["experiment"], row["metrics"].get("final/size_bytes", 0.0)))


def print_comparison(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print candidates as the leaderboard."""
    if not rows:
        console.print(
            "no candidates yet: run a workflow that ends with Promote, e.g. `stillhouse run quickstart`",
            highlight=False,
        )
        return
    headings = ["candidate", *(heading for _, heading, _ in COLUMNS)]
    cells = [[row["name"], *(_cell(metric, form, row["metrics"]) for metric, _, form in COLUMNS)] for row in rows]
    droppable = ("bits/weight", "tokens/s", "cost, s", "compression", "decode p50, ms")
    console.print(fitting_table(headings, cells, width=console.width, droppable=droppable))


def _cell(metric: str, form: str, metrics: Mapping[str, float]) -> str:
    if metric not in metrics:
        return "–"
    value = metrics[metric]
    return form.format(value / 1e6 if metric == "final/size_bytes" else value)


def serve_ui(settings: Settings, port: int, console: Console) -> int:
    """Become the MLflow UI's server, so that whoever stops this process stops it; return where it needs none."""
    tracking = settings.tracking(ArtifactStore(settings.store))
    if tracking.startswith(("http://", "https://")):
        console.print(f"the tracking server has its own UI: {redacted(tracking)}", highlight=False)
        return 0
    if tracking.startswith("sqlite:///") and not os.path.exists(tracking.removeprefix("sqlite:///")):
        raise ConfigError(f"there is no ledger at {tracking} yet; run a workflow first, or name its store with --store")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ConfigError(
                f"port {port} of 127.0.0.1 cannot be used ({error}); choose another with --port"
            ) from error
    address = f"http://127.0.0.1:{port}"
    console.print("candidates side by side, once the server is up (Ctrl-C ends it):", highlight=False)
    for name, experiment_id in sorted({(row["experiment"], row["experiment_id"]) for row in read_candidates(tracking)}):
        page = f"{address}/{CANDIDATES_PATH.format(experiment_id=experiment_id)}"
        console.print(f"  {name}: {page} · charts: {page}&compareRunsMode=CHART", highlight=False, soft_wrap=True)
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--backend-store-uri",
        tracking,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",
        "1",
    ]
    sys.stdout.flush()
    # Its runner of jobs, for what stillhouse has none of, would be eight more processes of 240 MB each.
    quiet = {
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "PYTHONWARNINGS": "ignore",
    }
    os.execve(sys.executable, command, {**os.environ, **quiet})
