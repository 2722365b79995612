"""What one teaching actor does: load the teacher once, then turn token shards into signal shards. Imports no ray."""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from stages.contract import Artifact, Shards
from stages.errors import StageFailed
from stages.formats.dataset import DatasetInfo
from stages.formats.signal_shards import signals_name
from stages.models.checkpoints import load_model
from stages.models.compatibility import check_compatible
from stages.teach.engines.local import LocalTeacher
from stages.teach.shards import teach_shard

BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
"""Tokens in one forward pass where `micro_batch` is not set: what keeps a device busy at little memory."""


@dataclass(frozen=True, slots=True)
class TeachJob:
    """What travels to the actors."""

    teacher: Artifact
    data: Artifact
    dataset: DatasetInfo
    shards: Shards
    k: int
    temperatures: tuple[float, ...]
    dtype: str
    micro_batch: int | None
    device: str


@dataclass(frozen=True, slots=True)
class ShardFacts:
    """What a shard's receipt says of it."""

    rows: int
    tokens: int
    size_bytes: int
    seconds: float
    whole_rows: bool = True
    """Whether rows went through the teacher whole; where not, each segment was run as a row of its own."""


def read_facts(shards: Shards) -> dict[str, ShardFacts]:
    """Return the facts of every signal shard that is written, by logical name.

    Raises:
        StageFailed: another version wrote their receipts.
    """
    try:
        return {name: ShardFacts(**facts) for name, facts in shards.done().items()}
    except TypeError as error:
        raise StageFailed(
            f"the receipts of signal shards in {shards.resume.uri} are of another version of stillhouse ({error}); run "
            "with this version into another store"
        ) from error


class ShardTeacher:
    """One loaded teacher.

    It loads with its first shard: what an actor's constructor raises comes back as the text of a lost actor.
    """

    def __init__(self, job: TeachJob) -> None:
        self._job = job
        self._engine: LocalTeacher | None = None

    def _load(self) -> LocalTeacher:
        job = self._job
        folder = job.teacher.folder("model")
        check_compatible("the teacher", folder, job.dataset)
        model: Any = load_model(folder, dtype=job.dtype, device=job.device)
        return LocalTeacher(model, vocabulary=job.dataset.vocabulary_size, k=job.k, temperatures=job.temperatures)

    def teach(self, name: str) -> Iterator[int]:
        """Write the signal shard of a token shard; yield the tokens of each batch as it is taught.

        Raises:
            StageFailed: the teacher does not fit the dataset, or gave logits that are not finite.
            OutOfMemory: the device's memory did not hold a batch.
        """
        job = self._job
        self._engine = self._engine or self._load()
        (path,) = job.data.paths(name)
        started = time.monotonic()
        batch_rows = job.micro_batch or max(1, BATCH_TOKENS[job.device] // job.dataset.sequence_length)
        done = yield from teach_shard(path, self._engine.signals, batch_rows=batch_rows, dtype=job.dtype)
        seconds = time.monotonic() - started
        facts = ShardFacts(done.rows, done.tokens, len(done.data), seconds, self._engine.whole_rows)
        job.shards.write(signals_name(name), done.data, asdict(facts))
