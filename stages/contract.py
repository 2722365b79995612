"""What a stage is, and what passes between the engine and a stage: config and artifacts in, files and metrics out.

A stage is a frozen config with one method, `run(context)`. Its fields are what its result depends on, and nothing
else; where and how fast it runs is `Resources` and reaches it through the context. It reads `context.inputs`, writes
files below `context.out`, keeps what it needs to go on after a crash below `context.resume`, and returns an
`Outcome`. It does not know the engine, tracking or the step's name.

Files that each kind of artifact holds (logical names, relative to the artifact):

| kind    | files |
| ---     | --- |
| dataset | `dataset.json`, `tokenizer/…`, `tokens/<split>-<part>-<number>.parquet` (train, validation, calibration) |
| signals | `signals.json`, `signals/<shard>.parquet` |
| model   | `model/…` (a checkpoint as the hub lays it out, with its tokenizer), `training.json`, or `derived.json` |
| search  | `search.json`, `finalists/<scheme>/…` (checkpoints) |
| scores  | `scores.json`, `documents.parquet` |
| speed   | `speed.json` |
| report  | `report.json`, `leaderboard.md`, `quality-size.png` |
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, Self

from pydantic import BaseModel, ConfigDict, Field

from stages.storage import AlreadyExists, File, Folder, cache_root, fetch

Kind = Literal["dataset", "signals", "model", "search", "scores", "speed", "report"]
Split = Literal["train", "validation", "calibration"]


class Config(BaseModel):
    """A frozen value that a user configures; unknown fields are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ExternalData(Config, ABC):
    """A value that names data from outside: it counts in identity by what the data is, never by where it lies."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Return plain JSON that changes exactly when the data does.

        Raises:
            ExternalDataError: the data is missing, unreadable or out of reach.
        """

    def resolved(self) -> Self:
        """Return it as a worker is to read it: hub ids at the commit they name now, paths absolute."""
        return self


class Resources(Config):
    """Where and how fast a step runs: never part of identity."""

    workers: int = Field(1, ge=1)
    """Processes that do the work: training ranks, teacher-inference actors, concurrent search trials."""
    cpus_per_worker: float = Field(1.0, gt=0)
    """CPU cores each of them takes; also its torch threads."""
    gpus_per_worker: float = Field(0.0, ge=0)
    """GPUs each of them takes."""
    memory_bytes_per_worker: int | None = Field(None, ge=1)
    """Memory each of them reserves on its node; None reserves nothing."""
    micro_batch: int | None = Field(None, ge=1)
    """Rows in one forward pass; None lets the stage choose. Halved after an out-of-memory."""

    @property
    def total_cpus(self) -> float:
        """CPU cores that the step's workers take together."""
        return self.workers * self.cpus_per_worker

    @property
    def total_gpus(self) -> float:
        """GPUs that the step's workers take together."""
        return self.workers * self.gpus_per_worker


@dataclass(frozen=True, slots=True)
class Input:
    """What an input of a stage accepts."""

    kinds: tuple[Kind, ...]
    many: bool = False
    """Takes a mapping from candidate name to artifact instead of one artifact."""
    required: bool = True


@dataclass(frozen=True, slots=True)
class Artifact:
    """A committed artifact, or a checkpoint from outside, as a stage reads it."""

    kind: Kind
    fingerprint: str
    files: tuple[File, ...]
    metrics: Mapping[str, float] = field(default_factory=dict)

    def below(self, pattern: str) -> tuple[File, ...]:
        """Return the files whose logical name matches a glob, sorted by name."""
        return tuple(sorted((f for f in self.files if fnmatch(f.name, pattern)), key=lambda f: f.name))

    def _cache(self) -> Path:
        where = hashlib.sha256(json.dumps(sorted((f.name, f.sha256) for f in self.files)).encode()).hexdigest()
        return cache_root() / "artifacts" / self.fingerprint[:16] / where[:16]

    def paths(self, pattern: str) -> tuple[Path, ...]:
        """Return local paths of the files that match a glob, downloaded where they lie in an object store."""
        return tuple(fetch(file, self._cache()) for file in self.below(pattern))

    def folder(self, name: str) -> Path:
        """Return a local folder that holds the files below `name/`.

        Raises:
            FileNotFoundError: the artifact has no such files.
        """
        files = self.below(f"{name}/*")
        if not files:
            raise FileNotFoundError(f"the {self.kind} artifact {self.fingerprint[:12]} has no files below {name!r}")
        paths = [fetch(file, self._cache()) for file in files]
        return paths[0].parents[files[0].name.removeprefix(f"{name}/").count("/")]

    def read_bytes(self, name: str) -> bytes:
        """Read one of the artifact's files whole; a kind's JSON is read through its model in `stages.formats`."""
        (path,) = self.paths(name)
        return path.read_bytes()


class Reporter(Protocol):
    """Where a stage reports how far it is. Picklable; may be called from any Ray worker; never blocks, never raises."""

    def started(self) -> None:
        """Report that the work has the resources that it asked for: the wait for them is over."""

    def progress(self, done: float, total: float, unit: str) -> None:
        """Report how much of the work is done, e.g. `progress(12, 40, "steps")`."""

    def curve(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add a point to the step's curves, e.g. `curve(20, {"train/loss": 3.1})`."""

    def note(self, text: str) -> None:
        """Show people one line."""


@dataclass(frozen=True, slots=True)
class Context:
    """What the engine hands to a stage's `run`."""

    fingerprint: str
    inputs: Mapping[str, Artifact | Mapping[str, Artifact]]
    out: Folder
    """This attempt's own folder: a file written here as `model/config.json` has that logical name."""
    resume: Folder
    """Survives a crash: snapshots and receipts of earlier attempts. Never part of the artifact."""
    resources: Resources
    reporter: Reporter

    def one(self, name: str) -> Artifact:
        """Return a single input."""
        value = self.inputs[name]
        assert isinstance(value, Artifact), f"input {name!r} holds many artifacts"
        return value

    def many(self, name: str) -> Mapping[str, Artifact]:
        """Return an input of many artifacts, by candidate name; empty where the input is absent."""
        value = self.inputs.get(name, {})
        assert not isinstance(value, Artifact), f"input {name!r} holds one artifact"
        return value

    def optional(self, name: str) -> Artifact | None:
        """Return a single input, or None where it is absent."""
        return self.one(name) if name in self.inputs else None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a stage's `run` returns: final metrics."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    """Final numbers, with units in their names; they travel in the manifest only."""


class Stage(Config, ABC):
    """One kind of work: a frozen config and `run`."""

    KIND: ClassVar[Kind]
    """The kind of artifact that it leaves."""
    REVISION: ClassVar[str]
    """`YYYY-MM-DD why`, changed with each edit that changes results; part of identity."""
    INPUTS: ClassVar[Mapping[str, Input]] = {}
    FRESH_PROCESS: ClassVar[bool] = False
    """Needs a worker process of its own, since its library leaves state behind (costs about 230 ms)."""
    PLACES_WORKERS: ClassVar[bool] = False
    """Hands its work to Ray, which may let it wait for resources: its workers begin with `WorkerSetup.begin`."""

    def check(self, sources: "Mapping[str, Stage | ExternalData | Mapping[str, Stage | ExternalData]]") -> None:
        """Check what can be known before anything runs: this config against those of the steps that feed it.

        Raises:
            ConfigError: they do not fit together.
        """

    def resolved(self) -> Self:
        """Return the stage with its data from outside resolved: what was planned is what a worker reads."""
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        return self.model_copy(
            update={name: value.resolved() for name, value in fields.items() if isinstance(value, ExternalData)}
        )

    @abstractmethod
    def run(self, context: Context) -> Outcome:
        """Do the work.

        Raises:
            StageFailed: the work failed; `Transient` and `OutOfMemory` where trying again may help.
        """


@dataclass(frozen=True, slots=True)
class Shards:
    """Output files of long work, each with a receipt, so that a later attempt does only those that are missing.

    A shard is written under this attempt's own folder; its receipt, written after it into `resume`, says where it
    lies in the artifact and what its bytes are. Picklable: workers write through it directly.
    """

    out: Folder
    resume: Folder

    def done(self) -> dict[str, dict[str, Any]]:
        """Return the facts of every shard that is written, by logical name."""
        return {receipt["name"]: receipt["facts"] for receipt in _receipts(self.resume)}

    def write(self, name: str, data: bytes, facts: Mapping[str, Any]) -> None:
        """Write a shard, then its receipt. A shard that another attempt finished meanwhile stays as it is."""
        file = self.out.put(name, data)
        receipts, receipt_name = self.resume / "receipts", name.replace("/", "~") + ".json"
        path = file.uri.removeprefix(_artifact_folder(self.resume).uri + "/")
        receipt = {"name": name, "path": path, "size_bytes": file.size_bytes, "sha256": file.sha256}
        try:
            receipts.put_json(receipt_name, {**receipt, "facts": dict(facts)}, create=True)
        except AlreadyExists:
            found = receipts.find_json(receipt_name)
            if found is None:  # a power cut tore it
                receipts.put_json(receipt_name, {**receipt, "facts": dict(facts)})
            elif found["path"] != path:  # else it is ours, of a task that Ray ran twice
                self.out.delete([name])


def read_receipts(resume: Folder) -> list[File]:
    """Return the files that the receipts below a `resume` folder name, under the spelling by which it is reached."""
    root = _artifact_folder(resume)
    return [File(r["name"], root.uri_of(r["path"]), r["size_bytes"], r["sha256"]) for r in _receipts(resume)]


def _receipts(resume: Folder) -> list[dict[str, Any]]:
    receipts = resume / "receipts"
    found = (receipts.find_json(entry.name) for entry in receipts.entries())
    return [receipt for receipt in found if receipt is not None]


def _artifact_folder(resume: Folder) -> Folder:
    """Return the folder that holds an artifact's `out/…` and `resume/…`."""
    return Folder(resume.uri.rpartition("/resume")[0])
