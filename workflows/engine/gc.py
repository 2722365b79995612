"""Finds and deletes what a store holds and nothing needs any more.

Kept: what is pinned, registered in any MLflow that the store was used with, read by a live run or one of the newest,
written to lately, or under a live run's lease; and all that these were made from.
Collected: every other artifact; of kept ones the output of attempts that no commit names, and the snapshots of
generations that are committed; of runs those that are over, wholly published, and made nothing that is kept.

Promises: a run announces itself (`heartbeat`) before it plans, and then says what it reads (`steps.json`). Nothing is
deleted while one is between the two, nor what one planned to read that began while this looked: commits go first, and
come back where a run has begun since; only then their files go. What another `gc` deleted meanwhile is passed over.
Does not: ask whether a file is whole (`artifacts verify`).
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Literal

from stages.errors import ConfigError, StillhouseError
from stages.storage import AlreadyExists, Entry, Folder
from workflows.engine.lease import number_of
from workflows.engine.store import ArtifactStore, reachable
from workflows.engine.tracking.publisher import PUBLISHED, publisher_lease
from workflows.engine.tracking.queries import registered_fingerprints
from workflows.engine.tracking.tracking_uri import (
    TrackingUnavailable,
    default_tracking_uri,
    known_tracking_uris,
    without_userinfo,
)


class StoreBusy(StillhouseError):
    """What some run reads is not known: what is garbage cannot be known now."""


@dataclass(frozen=True, slots=True)
class GarbageItem:
    """Objects that go together."""

    kind: Literal["artifact", "attempt", "snapshot", "run"]
    name: str
    """The artifact's fingerprint, or the run."""
    text: str
    """What it is, for people: `workflow/step`, and of which attempt or generation."""
    folder: Folder
    entries: tuple[Entry, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of its objects."""
        return sum(entry.size_bytes for entry in self.entries)

    @property
    def modified(self) -> float:
        """When the newest of them was written."""
        return max((entry.modified for entry in self.entries), default=0.0)


@dataclass(frozen=True, slots=True)
class Garbage:
    """What may be deleted, what not, and every run that the store knew when that was found out."""

    items: tuple[GarbageItem, ...]
    kept: frozenset[str]
    """Fingerprints."""
    kept_runs: tuple[str, ...]
    runs: frozenset[str]


def find_garbage(store: ArtifactStore, *, tracking_uri: str | None, keep_runs: int, min_age_seconds: float) -> Garbage:
    """Return what nothing needs any more; delete nothing.

    Args:
        store: the store.
        tracking_uri: an MLflow to ask besides those that the store was used with.
        keep_runs: keep what the newest so many runs reach.
        min_age_seconds: keep what was written to less than so long ago.

    Raises:
        StoreBusy: a live run has not said yet what it reads, or what a kept one reads is torn.
        TrackingUnavailable: a registry cannot be asked, so nothing is known to be safe to delete.
    """
    before, known = time.time() - min_age_seconds, store.fingerprints()
    runs = store.root / "runs"
    names = runs.children()
    alive = [run for run in names if store.liveness.run_alive(run)]
    if starting := [run for run in alive if not (runs / run).has("steps.json")]:
        raise StoreBusy(
            f"run {starting[0]} is starting and has not said yet which artifacts it reads, so nothing is collected; "
            "run gc again in a minute, or once that run is over"
        )
    newest = islice((run for run in reversed(names) if (runs / run).has("steps.json")), keep_runs)
    kept_runs = tuple(sorted({*alive, *newest}))
    roots = _registered(store, tracking_uri) | set(store.pins())
    for run in kept_runs:
        roots.update(_reads(runs / run).values())
    reached = reachable(store, roots & set(known))
    unreached = [
        GarbageItem("artifact", name, _label(store, name), store.folder(name), tuple(store.folder(name).entries()))
        for name in known
        if name not in reached
    ]
    young = [item.name for item in unreached if item.modified > before or store.lease(item.name).holder()]
    reached |= reachable(store, young)
    items = [item for item in unreached if item.name not in reached]
    kept = frozenset(known) - {item.name for item in items}
    items += [item for name in sorted(kept) for item in _leftovers(store, name) if item.modified <= before]
    makers = {commit.manifest.run for name in kept for commit in store.commits(name)}
    over = [run for run in names if run not in {*kept_runs, *makers}]
    items += [item for run in over for item in _record(store, runs / run, run) if item.modified <= before]
    return Garbage(tuple(items), kept, kept_runs, frozenset(names))


def delete(store: ArtifactStore, garbage: Garbage) -> None:
    """Delete what `find_garbage` found.

    Raises:
        StoreBusy: a run began meanwhile, which may read some of it: nothing is deleted.
    """
    commits: list[tuple[Folder, str, bytes]] = []
    for item in garbage.items:
        for name in (entry.name for entry in item.entries if entry.name.startswith("commits/")):
            with suppress(FileNotFoundError):
                commits.append((item.folder, name, item.folder.get(name)))
    for folder, name, _ in commits:
        folder.delete([name])
    if began := sorted(set((store.root / "runs").children()) - garbage.runs):
        for folder, name, data in commits:
            with suppress(AlreadyExists):
                folder.put(name, data, create=True)
        raise StoreBusy(f"run {began[0]} began while gc was looking, so nothing is deleted; run gc again")
    for item in garbage.items:
        item.folder.delete([entry.name for entry in item.entries if not entry.name.startswith("commits/")])
        item.folder.prune()


def _reads(run: Folder) -> Mapping[str, str]:
    """Return step → fingerprint of a run; of one that was refused before it read anything, nothing."""
    steps: Mapping[str, str] | None = run.find_json("steps.json")
    if steps is None and run.has("steps.json"):
        raise StoreBusy(
            f"{run.uri_of('steps.json')} is torn, as by a power cut, so what that run read is not known and nothing is "
            "collected; delete that object if nothing is to be kept on its account"
        )
    return steps or {}


def _registered(store: ArtifactStore, tracking_uri: str | None) -> set[str]:
    """Return the fingerprints that the registries name of every MLflow that the store was used with."""
    known = known_tracking_uris(store.root)
    given = [tracking_uri] if tracking_uri else [] if known else [default_tracking_uri(store.uri)]
    found: set[str] = set()
    for uri in [*given, *(uri for uri in known if uri not in map(without_userinfo, given))]:
        try:
            found |= registered_fingerprints(uri)
        except (TrackingUnavailable, ConfigError) as error:
            raise TrackingUnavailable(
                f"{error}; models of this store may be registered there, so nothing is collected: start it, or give it "
                "with user and password as --tracking-uri; if it is gone for good, delete the object that names it in "
                f"{store.root.uri_of('mlflow/known')}"
            ) from error
    return found


def _label(store: ArtifactStore, fingerprint: str) -> str:
    commit = store.newest(fingerprint)
    return f"{commit.manifest.workflow}/{commit.manifest.step}" if commit else "(unfinished)"


def _leftovers(store: ArtifactStore, fingerprint: str) -> Iterator[GarbageItem]:
    """Yield what a kept artifact's attempts left that nobody reads and no attempt goes on from."""
    if store.lease(fingerprint).holder():
        return
    folder, label = store.folder(fingerprint), _label(store, fingerprint)
    named = {int(file.path.split("/")[1]) for commit in store.commits(fingerprint) for file in commit.manifest.files}
    committed = max(map(number_of, (folder / "commits").entries()), default=0)
    snapshots = _parts(folder, "resume")
    for generation, entries in snapshots.items():
        if generation <= committed:
            text = f"{label}, snapshots of generation {generation}, which is committed"
            yield GarbageItem("snapshot", fingerprint, text, folder, entries)
    if any(generation > committed for generation in snapshots):
        return  # an attempt to come goes on from what earlier ones wrote
    for epoch, entries in _parts(folder, "out").items():
        if epoch not in named:
            text = f"{label}, output of attempt {epoch}, which no commit names"
            yield GarbageItem("attempt", fingerprint, text, folder, entries)


def _parts(folder: Folder, prefix: str) -> dict[int, tuple[Entry, ...]]:
    """Return the objects `<prefix>/<number>/…` of a folder by number."""
    parts = groupby(folder.entries(prefix), lambda entry: int(entry.name.split("/")[1]))
    return {number: tuple(entries) for number, entries in parts}


def _record(store: ArtifactStore, folder: Folder, run: str) -> Iterator[GarbageItem]:
    """Yield the record of a run that is over, unless something of it is still to be published."""
    entries = folder.entries()
    published = any(entry.name == PUBLISHED for entry in entries)
    has_events = any(entry.name.startswith("events/") for entry in entries)
    if (published or not has_events) and not publisher_lease(store.root / "runs", run, store.liveness).holder():
        yield GarbageItem("run", run, "events and logs", folder, tuple(entries))
