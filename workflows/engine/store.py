"""Claims, attempts, commits and withdrawals over `stages.storage`: the only state that the engine has.

    <store>/artifacts/<fingerprint>/claims/, released/          the lease (`lease.py`); the highest epoch may write
                                   /resume/<generation>/<inputs>/  snapshots and receipts, for going on
                                   /out/<epoch>/…              what this epoch's attempt wrote
                                   /commits/<generation>.json  create-only: the manifest
                                   /withdrawn/<generation>.json
           /by-name/<workflow>/<step>.json                     for people and for `plan`'s reasons
           /runs/<run>/heartbeat.json, logs/, …
           /pins/<fingerprint>.json

Whatever must be unique is a create-only object, so that local disk and S3 give the same promises: of two writers of
one fingerprint one commits, and a writer that was overtaken cannot. Claims and commits on a local disk survive a power
cut; what else one tore counts as absent, which is logged.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from pydantic import ValidationError

from stages.contract import Artifact, read_receipts
from stages.errors import ConfigError, StillhouseError, nearest
from stages.external.digests import WatchDigest, digests_below
from stages.storage import AlreadyExists, File, Folder
from workflows.engine.heartbeat import Holder, Liveness
from workflows.engine.identity import Fingerprint
from workflows.engine.lease import Lease, number_of
from workflows.engine.manifest import InputCommit, Manifest, ManifestFile
from workflows.engine.retrying import brief

logger = logging.getLogger(__name__)


class Fenced(StillhouseError):
    """Another run took this step over; what this attempt wrote is not committed."""


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to write one fingerprint's next commit, as long as no higher epoch exists."""

    fingerprint: Fingerprint
    epoch: int
    generation: int


@dataclass(frozen=True, slots=True)
class Commit:
    """A committed artifact."""

    fingerprint: Fingerprint
    generation: int
    manifest: Manifest
    artifact: Artifact


class ArtifactStore:
    """A store: artifacts by fingerprint."""

    def __init__(self, uri: str) -> None:
        self.root = Folder.at(uri)
        self.liveness = Liveness(self.root / "runs")

    @property
    def uri(self) -> str:
        """Where the store is."""
        return self.root.uri

    def folder(self, fingerprint: str) -> Folder:
        """Return an artifact's folder."""
        return self.root / "artifacts" / fingerprint

    def check_writable(self) -> None:
        """Write and delete a probe.

        Raises:
            ConfigError: the store cannot be written.
        """
        name = f"probe-{os.getpid()}"
        try:
            self.root.put(name, b"stillhouse")
            self.root.delete([name])
        except Exception as error:
            problem = f"the store {self.uri} cannot be written: {brief(error)}"
            raise ConfigError(f"{problem}; name another with --store, or fix its rights") from error

    def generations(self, fingerprint: str) -> list[int]:
        """Return the generations that are committed and not withdrawn, oldest first."""
        folder = self.folder(fingerprint)
        withdrawn = {entry.name for entry in (folder / "withdrawn").entries()}
        return [number_of(entry) for entry in (folder / "commits").entries() if entry.name not in withdrawn]

    def commits(self, fingerprint: str) -> Iterator[Commit]:
        """Yield the commits that are whole and not withdrawn, newest first."""
        for generation in reversed(self.generations(fingerprint)):
            if commit := self.read(fingerprint, generation):
                yield commit

    def newest(self, fingerprint: str) -> Commit | None:
        """Return the newest commit that is whole and not withdrawn."""
        return next(self.commits(fingerprint), None)

    def read(self, fingerprint: str, generation: int) -> Commit | None:
        """Read one commit; None where there is none, or where a power cut left half of it."""
        folder, name = self.folder(fingerprint), f"commits/{generation:06d}.json"
        if (value := folder.find_json(name)) is None:
            return None
        manifest = Manifest.from_json(value, where=folder.uri_of(name))
        files = tuple(File(f.name, folder.uri_of(f.path), f.size_bytes, f.sha256) for f in manifest.files)
        artifact = Artifact(manifest.kind, fingerprint, files, manifest.metrics)
        return Commit(Fingerprint(fingerprint), generation, manifest, artifact)

    def fingerprints(self) -> list[str]:
        """Return every fingerprint that the store knows."""
        return (self.root / "artifacts").children()

    def resolve(self, text: str) -> Fingerprint:
        """Return the fingerprint that a prefix or `workflow/step` names.

        Raises:
            ConfigError: none or several do.
        """
        if "/" in text:
            pointer = self.pointed(*text.split("/", 1))
            if pointer is None:
                problem = f"the store {self.uri} has no artifact by the name {text!r}"
                raise ConfigError(f"{problem}; `stillhouse artifacts list` shows what it has")
            return Fingerprint(pointer.fingerprint)
        known = self.fingerprints()
        found = [fingerprint for fingerprint in known if fingerprint.startswith(text)]
        if len(found) != 1:
            what = f"{len(found)} artifacts" if found else "no artifact"
            hint = "; give more digits" if found else nearest(text, [each[:12] for each in known])
            raise ConfigError(f"{what} in {self.uri} begin with {text!r}{hint}")
        return Fingerprint(found[0])

    def lease(self, fingerprint: str) -> Lease:
        """Return the right to write a fingerprint's next commit."""
        return Lease(self.folder(fingerprint), self.liveness)

    def claim(self, fingerprint: Fingerprint, run: str) -> Claim | Holder:
        """Take the right to write, or return the live run that holds it; a run's own earlier claim is overtaken."""
        epoch = self.lease(fingerprint).acquire(Holder.of_this_process(run), renew=True)
        generations = map(number_of, (self.folder(fingerprint) / "commits").entries())
        return epoch if isinstance(epoch, Holder) else Claim(fingerprint, epoch, 1 + max(generations, default=0))

    def overtaken(self, claim: Claim) -> bool:
        """Return whether a later claim exists, so that this one's attempt works for nothing."""
        return self.lease(claim.fingerprint).latest() > claim.epoch

    def release(self, claim: Claim) -> None:
        """Give a claim up, so that another run need not wait for this one's end; again is as good as once."""
        self.lease(claim.fingerprint).release(claim.epoch)

    def out(self, claim: Claim) -> Folder:
        """Return the folder that only this claim's attempt writes."""
        return self.folder(claim.fingerprint) / "out" / f"{claim.epoch:06d}"

    def resume(self, claim: Claim, inputs: Mapping[str, InputCommit] | None = None) -> Folder:
        """Return the folder that attempts at this generation share, if they read the same commits of their inputs."""
        text = json.dumps({name: part.model_dump() for name, part in (inputs or {}).items()}, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        return self.folder(claim.fingerprint) / "resume" / f"{claim.generation:06d}" / digest

    def commit(self, claim: Claim, manifest: Manifest) -> Commit:
        """Publish an attempt's files; a commit of this claim that stands already, its answer lost, is returned.

        Raises:
            Fenced: a higher claim exists, or this generation is taken.
        """
        folder, short = self.folder(claim.fingerprint), claim.fingerprint[:12]
        if (highest := self.lease(claim.fingerprint).latest()) > claim.epoch:
            problem = f"epoch {claim.epoch} of {short} was overtaken by epoch {highest}; its output is not committed"
        else:
            problem = f"generation {claim.generation} of {short} is committed already"
            with suppress(AlreadyExists):
                folder.put_json(f"commits/{claim.generation:06d}.json", manifest.to_json(), durable=True)
        standing = self.read(claim.fingerprint, claim.generation)
        if standing is None or (standing.manifest.run, standing.manifest.epoch) != (manifest.run, claim.epoch):
            raise Fenced(problem)
        return standing

    def forget_resume(self, claim: Claim) -> None:
        """Delete what attempts kept in order to go on: the commit names every file that counts."""
        folder = self.folder(claim.fingerprint)
        folder.delete([entry.name for entry in folder.entries(f"resume/{claim.generation:06d}")])

    def withdraw(self, commit: Commit, reason: str) -> None:
        """Make a commit count no longer; nothing is deleted."""
        with suppress(AlreadyExists):
            name = f"withdrawn/{commit.generation:06d}.json"
            self.folder(commit.fingerprint).put_json(name, {"reason": reason}, create=True)

    def withdrawal(self, fingerprint: str) -> str | None:
        """Return why the newest withdrawn generation was withdrawn, or None where none was."""
        folder = self.folder(fingerprint) / "withdrawn"
        entries = folder.entries()
        found = folder.find_json(entries[-1].name) if entries else {}
        return found.get("reason") if found is not None else "for a reason that a power cut took"

    def problems(self, commit: Commit, watch: WatchDigest | None = None, *, anew: bool = False) -> list[str]:
        """Return what is wrong with a commit's files: missing, or of another size; with `watch`, of another digest.

        `watch` is handed each file's name and the bytes that are read. What was hashed before, and has not changed
        since, is remembered, and hashed again only if `anew`.
        """
        folder = self.folder(commit.fingerprint)
        there = {f"out/{entry.name}": entry.size_bytes for entry in (folder / "out").entries()}
        found, whole = [], {}
        for file in commit.manifest.files:
            if file.path not in there:
                found.append(f"{file.name} is missing")
            elif there[file.path] != file.size_bytes:
                found.append(f"{file.name} has {there[file.path]} bytes, expected {file.size_bytes}")
            else:
                whole[file.path] = file
        if watch and whole:
            known = digests_below(folder, whole, watch, anew=anew)
            found += [
                f"{file.name} has another sha256 than its manifest names"
                for path, file in whole.items()
                if known.get(path) != file.sha256
            ]
        return found

    def point(self, workflow: str, step: str, commit: Commit) -> None:
        """Let `by-name/<workflow>/<step>` name a commit; a symlink beside it on local disk, for people."""
        folder = self.root / "by-name" / workflow
        folder.put_json(f"{step}.json", {"fingerprint": commit.fingerprint, "generation": commit.generation})
        local, files = folder.local_path(), commit.manifest.files
        if local is None or not files:
            return
        newest_out = max(file.path.split("/")[1] for file in files)
        link, target = local / step, Path("../../artifacts") / commit.fingerprint / "out" / newest_out
        fresh = local / f".{step}.{os.getpid()}"
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(target)
        fresh.replace(link)

    def pointed(self, workflow: str, step: str) -> InputCommit | None:
        """Return the commit that `by-name/<workflow>/<step>` names, or None; a torn name is none."""
        with suppress(ValidationError):
            return InputCommit.model_validate((self.root / "by-name" / workflow).find_json(f"{step}.json"))
        return None

    def pin(self, fingerprint: Fingerprint, note: str) -> None:
        """Keep an artifact, whatever else reaches it."""
        (self.root / "pins").put_json(f"{fingerprint}.json", {"note": note})

    def pins(self) -> list[str]:
        """Return the fingerprints that are pinned."""
        return [entry.name.removesuffix(".json") for entry in (self.root / "pins").entries()]


def seal(out: Folder, resume: Folder) -> tuple[ManifestFile, ...]:
    """Return a manifest's file list: shards by their receipts, all else in `out` by its digest as written or hashed.

    Raises:
        StillhouseError: a shard that a receipt names is not there or not whole.
    """
    root = Folder(out.uri.rpartition("/out/")[0])
    sizes = {root.uri_of(f"out/{entry.name}"): entry.size_bytes for entry in (root / "out").entries()}
    files = {file.uri: file for file in read_receipts(resume)}
    for uri, file in files.items():
        if sizes.get(uri) != file.size_bytes:
            problem = f"the shard {uri} is missing or cut short, though its receipt is there"
            raise StillhouseError(f"{problem}; delete {resume.uri} and run again")
    names = {uri: uri.removeprefix(out.uri + "/") for uri in sizes if uri.startswith(out.uri + "/")}
    files |= {uri: out.identify(name) for uri, name in names.items() if uri not in files}
    return tuple(
        ManifestFile(name=f.name, path=f.uri.removeprefix(root.uri + "/"), size_bytes=f.size_bytes, sha256=f.sha256)
        for f in sorted(files.values(), key=lambda f: f.name)
    )


def cost_seconds(store: ArtifactStore, fingerprint: Fingerprint) -> float:
    """Return the wall-clock seconds of all the steps that an artifact was made by, each counted once."""
    made_by = _lineage(lambda each: islice(store.commits(each), 1), [fingerprint])
    return sum(commit.manifest.seconds for commits in made_by.values() for commit in commits)


def reachable(store: ArtifactStore, roots: Iterable[str]) -> set[str]:
    """Return the fingerprints that some roots are made of, themselves included."""
    return set(_lineage(store.commits, roots))


def _lineage(read: Callable[[str], Iterable[Commit]], roots: Iterable[str]) -> dict[str, list[Commit]]:
    """Return the commits that `read` gives of each root and of all that those were made from; each is read once."""
    found: dict[str, list[Commit]] = {}
    todo = list(roots)
    while todo:
        if (current := todo.pop()) not in found:
            found[current] = list(read(current))
            todo.extend(part.fingerprint for commit in found[current] for part in commit.manifest.inputs.values())
    return found
