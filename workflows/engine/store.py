"""Claims, attempts, commits and withdrawals over `stages.storage`: the only state that the engine has.

    <store>/artifacts/<fingerprint>/claims/<epoch>.json        create-only; the highest epoch may write
                                   /released/<epoch>.json      its holder is done with it, though it may live on
                                   /resume/<generation>/<inputs>/  snapshots and receipts, for going on
                                   /out/<epoch>/…              what this epoch's attempt wrote
                                   /commits/<generation>.json  create-only: the manifest
                                   /withdrawn/<generation>.json
           /by-name/<workflow>/<step>.json                     for people and for `plan`'s reasons
           /runs/<run>/heartbeat.json, ledger/, logs/
           /pins/<fingerprint>.json

Whatever must be unique is a create-only object, so that local disk and S3 give the same promises: of two writers of
one fingerprint one commits, and a writer that was overtaken cannot.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.contract import Artifact, read_receipts
from stages.errors import ConfigError, StillhouseError, nearest
from stages.storage import AlreadyExists, File, Folder
from workflows.engine.heartbeat import Holder, Liveness
from workflows.engine.identity import Fingerprint
from workflows.engine.manifest import InputCommit, Manifest, ManifestFile


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

    @property
    def seconds(self) -> float:
        """Wall-clock seconds that the attempt took."""
        return self.manifest.seconds


class ArtifactStore:
    """A store: artifacts by fingerprint."""

    def __init__(self, uri: str, *, liveness: Liveness | None = None) -> None:
        """Open a store at a path or URI; nothing is written."""
        self.root = Folder.at(uri)
        self.liveness = liveness or Liveness(self.root / "runs")

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
            text = str(error).split("\n", 1)[0]
            raise ConfigError(
                f"the store {self.uri} cannot be written: {text}; name another with --store, or mend its rights"
            ) from error

    # Reading --------------------------------------------------------------------------------------------------------

    def generations(self, fingerprint: str) -> list[int]:
        """Return the generations that are committed and not withdrawn, oldest first."""
        folder = self.folder(fingerprint)
        withdrawn = {entry.name for entry in (folder / "withdrawn").entries()}
        return [
            int(entry.name.removesuffix(".json"))
            for entry in (folder / "commits").entries()
            if entry.name not in withdrawn
        ]

    def newest(self, fingerprint: Fingerprint) -> Commit | None:
        """Return the newest commit that is not withdrawn."""
        generations = self.generations(fingerprint)
        return self.read(fingerprint, generations[-1]) if generations else None

    def read(self, fingerprint: Fingerprint, generation: int) -> Commit:
        """Read one commit."""
        folder = self.folder(fingerprint)
        name = f"commits/{generation:06d}.json"
        manifest = Manifest.parse(folder.get(name), where=folder.uri_of(name))
        files = tuple(File(f.name, folder.uri_of(f.path), f.size_bytes, f.sha256) for f in manifest.files)
        artifact = Artifact(manifest.kind, fingerprint, files, manifest.metrics)
        return Commit(fingerprint, generation, manifest, artifact)

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
                raise ConfigError(
                    f"the store {self.uri} has no artifact by the name {text!r}; `stillhouse artifacts list` shows "
                    "what it has"
                )
            return Fingerprint(pointer["fingerprint"])
        known = self.fingerprints()
        found = [fingerprint for fingerprint in known if fingerprint.startswith(text)]
        if len(found) != 1:
            what = "no artifact" if not found else f"{len(found)} artifacts"
            raise ConfigError(
                f"{what} in {self.uri} begin with "
                f"{text!r}{nearest(text, [k[:12] for k in known]) if not found else '; give more digits'}"
            )
        return Fingerprint(found[0])

    # Claiming -------------------------------------------------------------------------------------------------------

    def claim(self, fingerprint: Fingerprint, run: str) -> Claim | Holder:
        """Take the right to write, or return the live run that holds it."""
        folder = self.folder(fingerprint)
        while True:
            epochs = [int(entry.name.removesuffix(".json")) for entry in (folder / "claims").entries()]
            highest = epochs[-1] if epochs else 0
            if highest:
                holder = self._holder(fingerprint, highest)
                if holder is not None and holder.run != run:
                    return holder
            epoch, generation = highest + 1, self._next_generation(fingerprint)
            try:
                folder.put_json(f"claims/{epoch:06d}.json", Holder.of_this_process(run).to_json(), create=True)
            except AlreadyExists:
                continue  # another run was faster: look at it
            return Claim(fingerprint, epoch, generation)

    def _holder(self, fingerprint: str, epoch: int) -> Holder | None:
        """Return who holds an epoch's claim, or None where it was released or its holder is dead."""
        folder = self.folder(fingerprint)
        if folder.has(f"released/{epoch:06d}.json"):
            return None
        holder = Holder.from_json(folder.get_json(f"claims/{epoch:06d}.json"))
        return holder if self.liveness.alive(holder) else None

    def release(self, claim: Claim) -> None:
        """Let go of a claim, so that another run need not wait for this one's end; again is as good as once."""
        with suppress(AlreadyExists):
            self.folder(claim.fingerprint).put_json(f"released/{claim.epoch:06d}.json", {}, create=True)

    def _next_generation(self, fingerprint: str) -> int:
        commits = (self.folder(fingerprint) / "commits").entries()
        return 1 + max((int(entry.name.removesuffix(".json")) for entry in commits), default=0)

    def out(self, claim: Claim) -> Folder:
        """Return the folder that only this claim's attempt writes."""
        return self.folder(claim.fingerprint) / "out" / f"{claim.epoch:06d}"

    def resume(self, claim: Claim, inputs: Mapping[str, InputCommit] | None = None) -> Folder:
        """Return the folder that attempts at this generation share, if they read the same commits of their inputs."""
        text = json.dumps({name: part.model_dump() for name, part in (inputs or {}).items()}, sort_keys=True)
        return self._resume(claim) / hashlib.sha256(text.encode()).hexdigest()[:12]

    def _resume(self, claim: Claim) -> Folder:
        return self.folder(claim.fingerprint) / "resume" / f"{claim.generation:06d}"

    def commit(self, claim: Claim, manifest: Manifest) -> Commit:
        """Publish an attempt's files.

        Raises:
            Fenced: a higher claim exists, or this generation is taken.
        """
        folder = self.folder(claim.fingerprint)
        highest = int((folder / "claims").entries()[-1].name.removesuffix(".json"))
        if highest != claim.epoch:
            raise Fenced(
                f"epoch {claim.epoch} of {claim.fingerprint[:12]} was overtaken by epoch {highest}; its output is "
                "not committed"
            )
        try:
            folder.put_json(f"commits/{claim.generation:06d}.json", manifest.to_json(), create=True)
        except AlreadyExists as error:
            raise Fenced(f"generation {claim.generation} of {claim.fingerprint[:12]} is committed already") from error
        return self.read(claim.fingerprint, claim.generation)

    def held(self, fingerprint: str) -> bool:
        """Tell whether a live run holds the claim."""
        entries = (self.folder(fingerprint) / "claims").entries()
        return bool(entries) and self._holder(fingerprint, int(entries[-1].name.removesuffix(".json"))) is not None

    def forget_resume(self, claim: Claim) -> None:
        """Delete what attempts kept in order to go on: the commit names every file that counts."""
        folder = self._resume(claim)
        folder.delete([entry.name for entry in folder.entries()])

    def withdraw(self, commit: Commit, reason: str) -> None:
        """Make a commit count no longer; nothing is deleted."""
        try:
            (self.folder(commit.fingerprint) / "withdrawn").put_json(
                f"{commit.generation:06d}.json", {"reason": reason}, create=True
            )
        except AlreadyExists:
            return

    def withdrawal(self, fingerprint: str) -> str | None:
        """Return why the newest withdrawn generation was withdrawn, or None where none was."""
        folder = self.folder(fingerprint) / "withdrawn"
        entries = folder.entries()
        return str(folder.get_json(entries[-1].name)["reason"]) if entries else None

    # Verifying ------------------------------------------------------------------------------------------------------

    def problems(self, commit: Commit, *, deep: bool) -> list[str]:
        """Return what is wrong with a commit's files: missing or of another size; with `deep`, of another digest."""
        folder = self.folder(commit.fingerprint)
        there = {f"out/{entry.name}": entry.size_bytes for entry in (folder / "out").entries()}
        found = []
        for file in commit.manifest.files:
            path = file.path
            if path not in there:
                found.append(f"{file.name} is missing")
            elif there[path] != file.size_bytes:
                found.append(f"{file.name} has {there[path]} bytes, expected {file.size_bytes}")
            elif deep and folder.digest(path).sha256 != file.sha256:
                found.append(f"{file.name} has another sha256 than its manifest names")
        return found

    # Names, pins ----------------------------------------------------------------------------------------------------

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

    def pointed(self, workflow: str, step: str) -> dict[str, Any] | None:
        """Return what `by-name/<workflow>/<step>` names, or None."""
        try:
            value: dict[str, Any] = (self.root / "by-name" / workflow).get_json(f"{step}.json")
        except FileNotFoundError:
            return None
        return value

    def pin(self, fingerprint: Fingerprint, note: str) -> None:
        """Keep an artifact, whatever else reaches it."""
        (self.root / "pins").put_json(f"{fingerprint}.json", {"note": note})

    def pins(self) -> list[str]:
        """Return the fingerprints that are pinned."""
        return [entry.name.removesuffix(".json") for entry in (self.root / "pins").entries()]


def seal(out: Folder, resume: Folder, root: Folder) -> tuple[ManifestFile, ...]:
    """Return a manifest's file list: shards by their receipts, everything else in `out` hashed as the store holds it.

    Raises:
        StillhouseError: a shard that a receipt names is not there or not whole.
    """
    receipts = {file.uri: file for file in read_receipts(resume)}
    here = {out.uri_of(entry.name): entry for entry in out.entries()}
    files = [out.digest(entry.name) for uri, entry in here.items() if uri not in receipts]
    for uri, file in receipts.items():
        parent, _, name = uri.rpartition("/")
        entry = here.get(uri) or next((e for e in Folder(parent).entries() if e.name == name), None)
        if entry is None or entry.size_bytes != file.size_bytes:
            raise StillhouseError(
                f"the shard {uri} is missing or cut short, though its receipt is there; delete {resume.uri} and "
                "run again"
            )
        files.append(file)
    return tuple(
        ManifestFile(name=f.name, path=f.uri.removeprefix(root.uri + "/"), size_bytes=f.size_bytes, sha256=f.sha256)
        for f in sorted(files, key=lambda f: f.name)
    )


def cost_seconds(store: ArtifactStore, fingerprint: Fingerprint) -> float:
    """Return the wall-clock seconds of all the steps that an artifact was made by, each counted once."""
    commits = (store.newest(Fingerprint(found)) for found in reachable(store, [fingerprint]))
    return sum(commit.seconds for commit in commits if commit is not None)


def reachable(store: ArtifactStore, roots: Iterable[str]) -> set[str]:
    """Return the fingerprints that some roots are made of, themselves included."""
    found: set[str] = set()
    todo = list(roots)
    while todo:
        current = Fingerprint(todo.pop())
        if current in found:
            continue
        found.add(current)
        for generation in store.generations(current):
            todo.extend(part.fingerprint for part in store.read(current, generation).manifest.inputs.values())
    return found
