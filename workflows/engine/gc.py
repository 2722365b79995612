"""Finds and deletes what a store holds and nothing needs any more.

Kept: what a pinned artifact, a registered version of any MLflow that the store was used with, a live run or one of the
newest runs reaches; what is younger than a minimum age; whatever a live run holds the lease of.
Collected: every other artifact; of kept ones the output of attempts that no commit names, and the snapshots of
generations that are committed; of runs those that are over, wholly published, not among the newest, and made nothing
that is kept.

Promises: a run announces itself (`heartbeat`) before it plans, and says what it reads (`steps.json`) once it has.
Nothing is deleted while one is between the two, nor what one planned to read that began while this looked: commits go
first, and come back where a run has begun since; only then their files go.
Does not: ask whether a file is whole (`artifacts verify`).
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any, Literal

from stages.errors import ConfigError, StillhouseError
from stages.storage import Entry, Folder
from workflows.engine.lease import number_of
from workflows.engine.store import ArtifactStore, reachable
from workflows.engine.tracking.queries import registered_fingerprints
from workflows.engine.tracking.tracking_uri import TrackingUnavailable, default_tracking_uri

__all__ = ["Garbage", "GarbageItem", "StoreBusy", "delete", "find_garbage"]

PUBLISHED = "ledger/finished.json"


def known_tracking_uris(root: Folder) -> list[str]:
    return []


def without_userinfo(uri: str) -> str:
    return uri


def publisher_lease(runs: Folder, run: str, liveness: Any) -> Any:
    from workflows.engine.lease import Lease

    return Lease(runs / run / "publisher", liveness)


IsOld = Callable[[Iterable[Entry]], bool]


class StoreBusy(StillhouseError):
    """A run is about to say what it reads: what is garbage cannot be known now."""


@dataclass(frozen=True, slots=True)
class GarbageItem:
    """Objects that go together."""

    kind: Literal["artifact", "attempt", "snapshot", "run"]
    name: str
    """The artifact's fingerprint, or the run."""
    text: str
    """What it is, for people: `workflow/step`, and of which attempt or generation."""
    folder: Folder
    objects: tuple[str, ...]
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Garbage:
    """What may be deleted, and what was there when that was found out."""

    items: tuple[GarbageItem, ...]
    kept: frozenset[str]
    """Fingerprints."""
    kept_runs: tuple[str, ...]
    runs: frozenset[str]
    """Every run that the store knew."""

    @property
    def size_bytes(self) -> int:
        """Bytes of all items."""
        return sum(item.size_bytes for item in self.items)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON."""
        rows = [
            {
                "kind": i.kind,
                "run" if i.kind == "run" else "fingerprint": i.name,
                "step": i.text,
                "size_bytes": i.size_bytes,
            }
            for i in self.items
        ]
        sizes = {kind: sum(item.size_bytes for item in items) for kind, items in self.by_kind().items()}
        return {
            "collected": rows,
            "size_bytes": self.size_bytes,
            "size_bytes_by_kind": sizes,
            "kept": len(self.kept),
            "kept_runs": list(self.kept_runs),
        }

    def by_kind(self) -> dict[str, list[GarbageItem]]:
        """Return the items of each kind that there are any of."""
        return {kind: list(items) for kind, items in groupby(self.items, lambda item: item.kind)}


def find_garbage(store: ArtifactStore, *, tracking_uri: str | None, keep_runs: int, min_age_seconds: float) -> Garbage:
    """Return what nothing needs any more; delete nothing.

    Args:
        store: the store.
        tracking_uri: an MLflow to ask besides those that the store was used with.
        keep_runs: keep what the newest so many runs reach.
        min_age_seconds: keep what was written to less than so long ago.

    Raises:
        StoreBusy: a live run has not said yet what it reads.
        TrackingUnavailable: a registry cannot be asked, so nothing is known to be safe to delete.
    """
    began = time.time()
    runs, known = store.root / "runs", store.fingerprints()
    names = runs.children()
    alive = [run for run in names if store.liveness.run_alive(run)]
    newest = islice((run for run in reversed(names) if _steps(runs / run)), keep_runs)
    kept_runs = sorted({*alive, *newest})
    if starting := [run for run in alive if _steps(runs / run) is None]:
        raise StoreBusy(
            f"run {starting[0]} is starting and has not said yet which artifacts it reads, so nothing is collected; "
            "run gc again in a minute, or once that run is over"
        )
    roots = _registered(store, tracking_uri) | set(store.pins())
    roots.update(fingerprint for run in kept_runs for fingerprint in (_steps(runs / run) or {}).values())
    reached = reachable(store, roots & set(known))

    def is_old(entries: Iterable[Entry]) -> bool:
        return all(began - entry.modified >= min_age_seconds for entry in entries)

    artifacts = {fp: item for fp in known if fp not in reached if (item := _artifact(store, fp, is_old))}
    kept = frozenset(known) - set(artifacts)
    leftovers = [item for fingerprint in sorted(kept) for item in _leftovers(store, fingerprint, is_old)]
    makers = {commit.manifest.run for fingerprint in kept for commit in store.commits(fingerprint)}
    old_runs = [
        item for run in names if run not in {*kept_runs, *makers} if (item := _run(store, runs / run, run, is_old))
    ]
    items = [*artifacts.values(), *sorted(leftovers, key=lambda item: item.kind), *old_runs]
    return Garbage(tuple(items), kept, tuple(kept_runs), frozenset(names))


def delete(store: ArtifactStore, garbage: Garbage) -> None:
    """Delete what `find_garbage` found.

    Raises:
        StoreBusy: a run began meanwhile, which may read some of it: nothing is deleted.
    """
    commits = [
        (item.folder, name, item.folder.get(name))
        for item in garbage.items
        if item.kind == "artifact"
        for name in item.objects
        if name.startswith("commits/")
    ]
    for folder, name, _ in commits:
        folder.delete([name])
    if began := sorted(set((store.root / "runs").children()) - garbage.runs):
        for folder, name, data in commits:
            folder.put(name, data)
        raise StoreBusy(f"run {began[0]} began while gc was looking, so nothing is deleted; run gc again")
    gone = {folder.uri_of(name) for folder, name, _ in commits}
    for item in garbage.items:
        item.folder.delete([name for name in item.objects if item.folder.uri_of(name) not in gone])
        item.folder.prune()


def _steps(run: Folder) -> Mapping[str, str] | None:
    """Return step → fingerprint of a run; None where it has not said yet, or never came so far."""
    steps: Mapping[str, str] | None = run.find_json("steps.json")
    return steps


def _registered(store: ArtifactStore, tracking_uri: str | None) -> set[str]:
    """Return the fingerprints that the registries of every MLflow name that the store was used with."""
    known = known_tracking_uris(store.root)
    given = [tracking_uri] if tracking_uri else [] if known else [default_tracking_uri(store.uri)]
    found: set[str] = set()
    for uri in [*given, *(uri for uri in known if uri not in map(without_userinfo, given))]:
        try:
            found |= registered_fingerprints(uri)
        except (TrackingUnavailable, ConfigError) as error:
            raise TrackingUnavailable(
                f"{error}; runs of this store may have registered models there, so nothing is collected: start it, or "
                "give it with user and password as --tracking-uri; if it is gone for good, delete the object that "
                f"names it in {store.root / 'mlflow' / 'known'}"
            ) from error
    return found


def _item(
    kind: Literal["artifact", "attempt", "snapshot", "run"], name: str, text: str, folder: Folder, entries: list[Entry]
) -> GarbageItem:
    objects, num_bytes = tuple(entry.name for entry in entries), sum(entry.size_bytes for entry in entries)
    return GarbageItem(kind, name, text, folder, objects, num_bytes)


def _label(store: ArtifactStore, fingerprint: str) -> str:
    commit = store.newest(fingerprint)
    return f"{commit.manifest.workflow}/{commit.manifest.step}" if commit else "(unfinished)"


def _artifact(store: ArtifactStore, fingerprint: str, is_old: IsOld) -> GarbageItem | None:
    """Return an artifact that nothing reaches, unless it is young or at work."""
    folder = store.folder(fingerprint)
    entries = folder.entries()
    if not is_old(entries) or store.held(fingerprint):
        return None
    return _item("artifact", fingerprint, _label(store, fingerprint), folder, entries)


def _leftovers(store: ArtifactStore, fingerprint: str, is_old: IsOld) -> Iterator[GarbageItem]:
    """Yield what a kept artifact's attempts left that nobody reads and no attempt goes on from."""
    folder = store.folder(fingerprint)
    named = {file.path.split("/")[1] for commit in store.commits(fingerprint) for file in commit.manifest.files}
    committed = max(map(number_of, (folder / "commits").entries()), default=0)
    resume, out = _parts(folder, "resume"), _parts(folder, "out")
    if store.held(fingerprint):
        return
    for generation, entries in resume.items():
        if int(generation) <= committed and is_old(entries):
            text = f"{_label(store, fingerprint)}, snapshots of committed generation {int(generation)}"
            yield _item("snapshot", fingerprint, text, folder, entries)
    if any(int(generation) > committed for generation in resume):
        return  # an attempt to come goes on from what earlier ones wrote
    for epoch, entries in out.items():
        if epoch not in named and is_old(entries):
            text = f"{_label(store, fingerprint)}, output of attempt {int(epoch)}, which no commit names"
            yield _item("attempt", fingerprint, text, folder, entries)


def _parts(folder: Folder, prefix: str) -> dict[str, list[Entry]]:
    """Return the objects `<prefix>/<part>/…` of a folder by their part."""
    entries = folder.entries(prefix)
    return {part: list(group) for part, group in groupby(entries, lambda entry: entry.name.split("/")[1])}


def _run(store: ArtifactStore, folder: Folder, run: str, is_old: IsOld) -> GarbageItem | None:
    """Return the record of an old run, unless something of it is still to be published."""
    entries = folder.entries()
    names = {entry.name for entry in entries}
    unpublished = PUBLISHED not in names and any(name.startswith("events/") for name in names)
    if unpublished or not is_old(entries) or publisher_lease(store.root / "runs", run, store.liveness).holder():
        return None
    return _item("run", run, "its events and logs", folder, entries)
