"""`stillhouse artifacts …`: the commands about the store."""

import time
from collections import Counter
from functools import partial
from typing import Any

from cyclopts import App
from rich.text import Text

from stages.errors import ConfigError
from workflows.commands.find import find_store
from workflows.commands.options import DEFAULT_STORE, FAILED, OK, Count, Hours, Json, Store, TrackingUri
from workflows.commands.output import console, duration, print_fields, print_json, print_table, say, size
from workflows.commands.terminal import progress_line
from workflows.engine.gc import delete, find_garbage
from workflows.engine.plan import watch_hashing
from workflows.engine.store import Commit

artifacts = App(
    name="artifacts", help="The store: what is in it, whether it is whole, what to keep.", result_action="return_value"
)


@artifacts.command(name="list")
def list_artifacts(*, store: Store = DEFAULT_STORE, json: Json = False) -> None:
    """List the artifacts: kind, step, size, when they were made."""
    opened = find_store(store)
    pins, commits = set(opened.pins()), filter(None, map(opened.newest, opened.fingerprints()))
    rows: list[dict[str, Any]] = [
        {
            "fingerprint": commit.fingerprint,
            "kind": commit.artifact.kind,
            "step": _step(commit),
            "size_bytes": _total_bytes(commit),
            "seconds": commit.manifest.seconds,
            "created": commit.manifest.created,
            "run": commit.manifest.run,
            "generation": commit.generation,
            "pinned": commit.fingerprint in pins,
        }
        for commit in sorted(commits, key=lambda commit: commit.manifest.created)
    ]
    if json:
        print_json({"artifacts": rows})
        return
    cells = []
    for row in rows:
        made = time.strftime("%Y-%m-%d %H:%M", time.localtime(row["created"]))
        amounts = size(row["size_bytes"]), duration(row["seconds"]), made
        cells.append([row["step"], row["kind"], *amounts, row["fingerprint"][:12], "pinned" if row["pinned"] else ""])
    headings = ("workflow/step", "kind", "size", "took", "made", "fingerprint", "")
    print_table(console(), headings, cells, droppable=("took", "kind", "made"))
    say(f"{len(rows)} artifacts, {size(sum(row['size_bytes'] for row in rows))}")


@artifacts.command
def show(artifact: str, *, store: Store = DEFAULT_STORE, json: Json = False) -> None:
    """Show an artifact: files, metrics, lineage, and the folder to load a checkpoint from.

    Args:
        artifact: the first digits of a fingerprint, or WORKFLOW/STEP.
    """
    opened = find_store(store)
    fingerprint = opened.resolve(artifact)
    commit = opened.newest(fingerprint)
    if commit is None:
        reason = opened.withdrawal(fingerprint) or "its step has not finished yet"
        raise ConfigError(f"{fingerprint[:12]} has no commit: {reason}")
    manifest, files = commit.manifest, commit.artifact.files
    folders = sorted({file.uri.rsplit("/", 1)[0] for file in files if file.name.endswith("/config.json")})
    answer = {
        "fingerprint": fingerprint,
        "kind": manifest.kind,
        "step": _step(commit),
        "run": manifest.run,
        "generation": commit.generation,
        "load from": "\n".join(folders) or "no checkpoint",
        "size": size(_total_bytes(commit)),
        "took": duration(manifest.seconds),
        "peak memory": size(manifest.peak_memory_bytes),
        "metrics": manifest.metrics,
        "inputs": {name: part.fingerprint[:12] for name, part in manifest.inputs.items()},
        "provenance": manifest.provenance.model_dump(),
        "files": [{"name": file.name, "size_bytes": file.size_bytes, "uri": file.uri} for file in files],
    }
    print_fields(answer, as_json=json)


@artifacts.command
def verify(*which: str, store: Store = DEFAULT_STORE, json: Json = False) -> int:
    """Hash files again and compare them with their manifests.

    What does not verify is withdrawn, and made again by the next run; runs need not hash again what does.

    Args:
        which: fingerprints or WORKFLOW/STEP; all if none is given.
    """
    opened, out, rows, corrupt = find_store(store), console(quiet=json), [], 0
    fingerprints = list(map(opened.resolve, which)) if which else opened.fingerprints()
    with progress_line(out, "verifying") as show:
        watch = watch_hashing(show)
        for commit in filter(None, map(opened.newest, fingerprints)):
            step = commit.manifest.step
            problems = opened.problems(commit, partial(watch, step), anew=True)
            rows.append({"fingerprint": commit.fingerprint, "step": step, "problems": problems})
            if problems:
                corrupt += 1
                opened.withdraw(commit, problems[0])
                text = f"✗ {commit.fingerprint[:12]} {step}: {'; '.join(problems)}; withdrawn"
                out.print(Text(text, style="bold red"), soft_wrap=True)
    if json:
        print_json({"artifacts": rows})
    else:
        say(f"{len(rows) - corrupt} artifacts verify, {corrupt} do not")
    return FAILED if corrupt else OK


@artifacts.command
def pin(artifact: str, *, note: str = "", store: Store = DEFAULT_STORE) -> None:
    """Keep an artifact and what it was made from, whatever `gc` would say.

    Args:
        artifact: the first digits of a fingerprint, or WORKFLOW/STEP.
        note: why.
    """
    opened = find_store(store)
    fingerprint = opened.resolve(artifact)
    opened.pin(fingerprint, note)
    say(f"pinned {fingerprint[:12]}")


@artifacts.command
def gc(
    *,
    keep_runs: Count = 5,
    min_age_hours: Hours = 24.0,
    yes: bool = False,
    store: Store = DEFAULT_STORE,
    tracking_uri: TrackingUri = None,
    json: Json = False,
) -> None:
    """Collect what no pinned artifact, kept run or registered version reaches. Only lists, unless `--yes`.

    Also: what failed attempts left, snapshots that no attempt goes on from, and the records of old runs whose artifacts
    are gone and that MLflow has.

    Args:
        keep_runs: keep what the newest so many runs used.
        min_age_hours: keep what was written less than so many hours ago.
        yes: delete.
    """
    opened = find_store(store)
    age = min_age_hours * 3600
    garbage = find_garbage(opened, tracking_uri=tracking_uri, keep_runs=keep_runs, min_age_seconds=age)
    rows, sizes = [], Counter[str]()
    for item in garbage.items:
        sizes[item.kind] += item.size_bytes
        name = "run" if item.kind == "run" else "fingerprint"
        rows.append({"kind": item.kind, name: item.name, "step": item.text, "size_bytes": item.size_bytes})
        if not json:
            say(f"{item.name if name == 'run' else item.name[:12]}  {item.text}  {size(item.size_bytes)}")
    if yes:
        delete(opened, garbage)
    if json:
        answer = {"collected": rows, "size_bytes": sizes.total(), "size_bytes_by_kind": sizes}
        print_json({**answer, "kept": len(garbage.kept), "kept_runs": garbage.kept_runs, "deleted": yes})
        return
    for kind, number in Counter(item.kind for item in garbage.items).items():
        say(f"{number} {kind}s, {size(sizes[kind])}")
    verb = "deleted" if yes else "would be deleted (give --yes to do it)"
    say(f"{size(sizes.total())} {verb}; {len(garbage.kept)} artifacts kept")


def _step(commit: Commit) -> str:
    return f"{commit.manifest.workflow}/{commit.manifest.step}"


def _total_bytes(commit: Commit) -> int:
    return sum(file.size_bytes for file in commit.artifact.files)
