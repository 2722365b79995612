"""`Teach`: run a teacher over a dataset once and store what students learn from, with Ray Data.

One actor holds one loaded teacher and works through whole token shards; each leaves one signal shard with a receipt,
so that after a crash only shards without one are done. Only small facts travel back.
"""

import logging
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from stages.contract import Config, Context, ExternalData, Input, Outcome, Shards, Split, Stage
from stages.errors import ConfigError, StageFailed
from stages.formats.dataset import DatasetInfo
from stages.formats.signals import SignalsInfo
from stages.runtime.processes import quiet_data
from stages.runtime.workarounds import deprecated_options
from stages.runtime.workers import WorkerSetup, device_of, translated_errors, worker_options

if TYPE_CHECKING:
    from stages.teach.work import ShardFacts, TeachJob

logger = logging.getLogger(__name__)


class TopK(Config):
    """Keep the k most probable tokens and the mass of all others."""

    kind: Literal["topk"] = "topk"
    k: int = Field(32, ge=1)
    """Entries kept for each token (6 bytes each)."""
    temperatures: tuple[float, ...] = (1.0, 2.0, 4.0)
    """Temperatures that students may train at; each costs 4 bytes a token, and none can be added later."""

    def model_post_init(self, _: Any) -> None:
        """Refuse temperatures that mean nothing."""
        if not self.temperatures or min(self.temperatures) <= 0 or len(set(self.temperatures)) < len(self.temperatures):
            raise ConfigError(f"temperatures are {self.temperatures}, expected one or more distinct numbers above 0")


class Teach(Stage):
    """Teacher and dataset → signals."""

    KIND: ClassVar = "signals"
    REVISION: ClassVar = "2026-11-25 each segment of a row alone; heads of half types computed in float32"
    PLACES_WORKERS: ClassVar = True
    INPUTS: ClassVar = {"teacher": Input(("model",)), "data": Input(("dataset",))}

    method: TopK = TopK(k=32)
    """What is kept of the teacher's distribution."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """What the teacher computes in; signals are reduced in float32 whatever it is."""
    split: Split = "train"
    """The split that students will train on."""

    def check(self, sources: Mapping[str, Stage | ExternalData | Mapping[str, Stage | ExternalData]]) -> None:
        """Check the checkpoints that are wired against the dataset.

        Raises:
            ConfigError: one does not fit.
        """
        from stages.models.compatibility import check_planned

        check_planned(sources, self.INPUTS, unquantized=("teacher",))

    def run(self, context: Context) -> Outcome:
        """Teach every shard that has no receipt yet, then write `signals.json`."""
        from stages.formats.signal_shards import signals_name
        from stages.formats.tokens import shard_pattern
        from stages.teach.work import read_facts

        data = context.one("data")
        dataset = DatasetInfo.read(data)
        if self.method.k > dataset.vocabulary_size:
            raise StageFailed(
                f"method.k is {self.method.k}, expected at most the dataset's vocabulary of {dataset.vocabulary_size} "
                "entries"
            )
        names = [file.name for file in data.below(shard_pattern(self.split))]
        if not names:
            raise StageFailed(
                f"the dataset has no shards of split {self.split!r}, expected one of "
                f"{sorted(dataset.splits)}; set Teach.split"
            )
        shards = Shards(context.out, context.resume)
        done = read_facts(shards)
        missing = [name for name in names if signals_name(name) not in done]
        logger.info("deciding to teach %d of %d shards, since the others have receipts", len(missing), len(names))
        if missing:
            self._teach(context, missing, shards, dataset)
            done = read_facts(shards)
        return self._conclude(context, [done[signals_name(name)] for name in names], dataset)

    def _teach(self, context: Context, missing: list[str], shards: Shards, dataset: DatasetInfo) -> None:
        from stages.teach.work import TeachJob, read_facts

        total = dataset.splits[self.split].rows * dataset.sequence_length
        finished = sum(facts.tokens for facts in read_facts(shards).values())
        job = TeachJob(
            teacher=context.one("teacher"),
            data=context.one("data"),
            dataset=dataset,
            shards=shards,
            k=self.method.k,
            temperatures=self.method.temperatures,
            dtype=self.dtype,
            micro_batch=context.resources.micro_batch,
            device=device_of(context.resources),
        )
        context.reporter.progress(finished, total, "tokens")
        for tokens in _map_shards(missing, job, context):
            finished += tokens
            context.reporter.progress(finished, total, "tokens")

    def _conclude(self, context: Context, done: "list[ShardFacts]", dataset: DatasetInfo) -> Outcome:
        tokens, size_bytes = sum(facts.tokens for facts in done), sum(facts.size_bytes for facts in done)
        if not all(facts.whole_rows for facts in done):
            from stages.models.segments import SEGMENTS_ALONE

            context.reporter.note(SEGMENTS_ALONE.format("the teacher"))
        SignalsInfo(
            method=self.method.kind,
            k=self.method.k,
            temperatures=self.method.temperatures,
            vocabulary_size=dataset.vocabulary_size,
            teacher_fingerprint=context.one("teacher").fingerprint,
            dataset_fingerprint=context.one("data").fingerprint,
            tokenizer_digest=dataset.tokenizer_digest,
            sequence_length=dataset.sequence_length,
            split=self.split,
            dtype=self.dtype,
            rows=sum(facts.rows for facts in done),
            tokens=tokens,
            bytes_per_token=size_bytes / tokens,
        ).write(context.out)
        busy = sum(facts.seconds for facts in done)
        return Outcome(
            {
                "teach/tokens": tokens,
                "teach/bytes_per_token": size_bytes / tokens,
                "teach/tokens_per_second_per_worker": tokens / max(busy, 1e-9),
            }
        )


PROGRESS_SECONDS = 1.0
"""Between two reports of an actor: a report is an object of Ray's, some milliseconds of work."""
MAX_BLOCKS = 10_000
"""Ray Data's blocks: one shard each, until there are more shards than this; each block is a task to schedule."""


class _Actor:
    """A `ShardTeacher` in an actor of Ray Data's pool."""

    def __init__(self, job: "TeachJob", setup: WorkerSetup) -> None:
        setup.begin()
        from stages.teach.work import ShardTeacher

        self._teacher = ShardTeacher(job)

    def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Teach the shards that a batch names; yield how many tokens are taught, each second or so and at their end."""
        for name in batch["item"]:
            tokens, since = 0, time.monotonic()
            for taught in self._teacher.teach(str(name)):
                tokens += taught
                if time.monotonic() - since >= PROGRESS_SECONDS:
                    yield {"tokens": [tokens]}
                    tokens, since = 0, time.monotonic()
            yield {"tokens": [tokens]}


def _map_shards(names: list[str], job: "TeachJob", context: Context) -> Iterator[int]:
    """Run the actor pool over shard names with Ray Data; yield the tokens that are taught, as actors tell them.

    The names lie in the object store already, so that nothing but the pool wants a CPU: no read or write task can be
    starved by it. Actors are not restarted, since retries are the engine's.
    """
    import ray

    quiet_data(ray.data.DataContext.get_current())
    resources = context.resources
    workers = min(resources.workers, len(names))
    blocks = min(len(names), MAX_BLOCKS)
    shards = ray.data.from_items([{"item": name} for name in names], override_num_blocks=blocks)
    shards.context.target_max_block_size = 1  # else what an actor yields waits for its last shard
    with deprecated_options():
        taught = shards.map_batches(
            _Actor,
            fn_constructor_args=(job, WorkerSetup.of(context)),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=workers),
            max_restarts=0,
            **worker_options(resources),
        )
    with translated_errors():
        for row in taught.iter_rows():
            yield int(row["tokens"])
