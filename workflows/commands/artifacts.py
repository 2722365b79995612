"""`stillhouse artifacts …`: the commands about the store."""

import time
from collections import Counter
from functools import partial
from typing import Any

from cyclopts import App
from rich.text import Text

from stages.errors import ConfigError
from workflows.commands.find import find_store
from workflows.commands.options import FAILED, OK, Count, Hours, OutputOptions, StoreOptions, TrackingOptions
from workflows.commands.output import console, duration, print_fields, print_json, print_table, say, size
from workflows.commands.terminal import progress_line
from workflows.engine.gc import delete, find_garbage
from workflows.engine.plan import watch_hashing
from workflows.engine.store import Commit

artifacts = App(
    name="artifacts", help="The store: what is in it, whether it is whole, what to keep.", result_action="return_value"
)


@artifacts.command(name="list")
def list_artifacts(*, at: StoreOptions = StoreOptions(), output: OutputOptions = OutputOptions()) -> None:
    """List the artifacts: kind, step, size, when they were made."""
    store = find_store(at.store)
    pins, commits = set(store.pins()), filter(None, map(store.newest, store.fingerprints()))
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
    if output.json:
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
def show(artifact: str, *, at: StoreOptions = StoreOptions(), output: OutputOptions = OutputOptions()) -> None:
    """Show an artifact: files, metrics, lineage, and the folder to load a checkpoint from.

    Args:
        artifact: the first digits of a fingerprint, or WORKFLOW/STEP.
    """
    store = find_store(at.store)
    fingerprint = store.resolve(artifact)
    commit = store.newest(fingerprint)
    if commit is None:
        reason = store.withdrawal(fingerprint) or "its step has not finished yet"
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
    print_fields(answer, as_json=output.json)


@artifacts.command
def verify(*which: str, at: StoreOptions = StoreOptions(), output: OutputOptions = OutputOptions()) -> int:
    """Hash files again and compare them with their manifests.

    What does not verify is withdrawn, and made again by the next run; runs need not hash again what does.

    Args:
        which: fingerprints or WORKFLOW/STEP; all if none is given.
    """
    store, out, rows, corrupt = find_store(at.store), console(quiet=output.json), [], 0
    fingerprints = list(map(store.resolve, which)) if which else store.fingerprints()
    with progress_line(out, "verifying") as show:
        watch = watch_hashing(show)
        for commit in filter(None, map(store.newest, fingerprints)):
            step = commit.manifest.step
            problems = store.problems(commit, deep=True, watch=partial(watch, step), anew=True)
            rows.append({"fingerprint": commit.fingerprint, "step": step, "problems": problems})
            if problems:
                corrupt += 1
                store.withdraw(commit, problems[0])
                text = f"✗ {commit.fingerprint[:12]} {step}: {'; '.join(problems)}; withdrawn"
                out.print(Text(text, style="bold red"), soft_wrap=True)
    if output.json:
        print_json({"artifacts": rows})
    else:
        say(f"{len(rows) - corrupt} artifacts verify, {corrupt} do not")
    return FAILED if corrupt else OK


@artifacts.command
def pin(artifact: str, *, note: str = "", at: StoreOptions = StoreOptions()) -> None:
    """Keep an artifact and what it was made from, whatever `gc` would say.

    Args:
        artifact: the first digits of a fingerprint, or WORKFLOW/STEP.
        note: why.
    """
    store = find_store(at.store)
    fingerprint = store.resolve(artifact)
    store.pin(fingerprint, note)
    say(f"pinned {fingerprint[:12]}")


@artifacts.command
def gc(
    *,
    keep_runs: Count = 5,
    min_age_hours: Hours = 24.0,
    yes: bool = False,
    at: TrackingOptions = TrackingOptions(),
    output: OutputOptions = OutputOptions(),
) -> None:
    """Collect what no pinned artifact, kept run or registered version reaches. Only lists, unless `--yes`.

    Also: what failed attempts left, snapshots that no attempt goes on from, and the records of old runs whose artifacts
    are gone and that MLflow has.

    Args:
        keep_runs: keep what the newest so many runs used.
        min_age_hours: keep what was written less than so many hours ago.
        yes: delete.
    """
    store = find_store(at.store)
    age = min_age_hours * 3600
    garbage = find_garbage(store, tracking_uri=at.tracking_uri, keep_runs=keep_runs, min_age_seconds=age)
    rows, sizes = [], Counter[str]()
    for item in garbage.items:
        sizes[item.kind] += item.size_bytes
        name = "run" if item.kind == "run" else "fingerprint"
        rows.append({"kind": item.kind, name: item.name, "step": item.text, "size_bytes": item.size_bytes})
        if not output.json:
            say(f"{item.name if name == 'run' else item.name[:12]}  {item.text}  {size(item.size_bytes)}")
    if yes:
        delete(store, garbage)
    if output.json:
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
