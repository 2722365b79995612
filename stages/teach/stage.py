"""`Teach`: run a teacher over a dataset once and store what students learn from, with Ray Data.

One actor holds one loaded teacher and works through whole token shards; each leaves one signals shard with a receipt,
so that after a crash only shards without one are done. Only small facts travel back.
"""

import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from stages.contract import Config, Context, Input, Outcome, Shards, Split, Stage
from stages.errors import ConfigError, StageFailed
from stages.runtime.processes import quiet_data
from stages.runtime.translation import translate

if TYPE_CHECKING:
    from stages.teach.engines.local import LocalTeacher

logger = logging.getLogger(__name__)

BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
"""Tokens in one forward pass where `micro_batch` is not set: what keeps a device busy at little memory."""


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
    REVISION: ClassVar = "2026-11-21 first"
    PLACES_WORKERS: ClassVar = True
    INPUTS: ClassVar = {"teacher": Input(("model",)), "data": Input(("dataset",))}

    method: TopK = TopK(k=32)
    """What is kept of the teacher's distribution."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """What the teacher computes in; signals are reduced in float32 whatever it is."""
    split: Split = "train"
    """The split that students will train on."""

    def run(self, context: Context) -> Outcome:
        """Teach every shard that has no receipt yet, then write `signals.json`."""
        data = context.one("data")
        facts = data.read_json("dataset.json")
        if self.method.k > facts["vocabulary_size"]:
            raise StageFailed(
                f"method.k is {self.method.k}, expected at most the dataset's vocabulary of {facts['vocabulary_size']} "
                "entries"
            )
        names = [file.name for file in data.below(f"tokens/{self.split}-*.parquet")]
        if not names:
            raise StageFailed(
                f"the dataset has no shards of split {self.split!r}, expected one of "
                f"{sorted(facts['splits'])}; set Teach.split"
            )
        shards = Shards(context.out, context.resume)
        done = shards.done()
        missing = [name for name in names if _signals_name(name) not in done]
        logger.info("deciding to teach %d of %d shards, since the others have receipts", len(missing), len(names))
        if missing:
            self._teach(context, missing, shards, facts)
            done = shards.done()
        return self._conclude(context, [done[_signals_name(name)] for name in names], facts)

    def _teach(self, context: Context, missing: list[str], shards: Shards, facts: Mapping[str, Any]) -> None:
        total = facts["splits"][self.split]["rows"] * facts["sequence_length"]
        finished = sum(fact["tokens"] for fact in shards.done().values())
        job = {
            "teacher": context.one("teacher"),
            "data": context.one("data"),
            "shards": shards,
            "reporter": context.reporter,
            "method": self.method,
            "dtype": self.dtype,
            "facts": facts,
            "micro_batch": context.resources.micro_batch,
            "threads": max(1, int(context.resources.cpus_per_worker)),
        }
        context.reporter.progress(finished, total, "tokens")
        for row in _map_shards(missing, job, context):
            finished += row["tokens"]
            context.reporter.progress(finished, total, "tokens")

    def _conclude(self, context: Context, shard_facts: list[dict[str, Any]], facts: Mapping[str, Any]) -> Outcome:
        rows, tokens, size = (sum(fact[key] for fact in shard_facts) for key in ("rows", "tokens", "bytes"))
        summary = {
            "method": self.method.kind,
            "k": min(self.method.k, facts["vocabulary_size"]),
            "temperatures": list(self.method.temperatures),
            "vocabulary_size": facts["vocabulary_size"],
            "teacher_fingerprint": context.one("teacher").fingerprint,
            "dataset_fingerprint": context.one("data").fingerprint,
            "tokenizer_digest": facts["tokenizer_digest"],
            "sequence_length": facts["sequence_length"],
            "split": self.split,
            "dtype": self.dtype,
            "rows": rows,
            "tokens": tokens,
            "bytes_per_token": size / tokens,
        }
        context.out.put_json("signals.json", summary)
        busy = sum(fact["seconds"] for fact in shard_facts)
        speed = tokens / max(busy, 1e-9)
        return Outcome(
            {
                "teach/tokens": tokens,
                "teach/bytes_per_token": size / tokens,
                "teach/tokens_per_second_per_worker": speed,
            }
        )


def _signals_name(tokens_name: str) -> str:
    return tokens_name.replace("tokens/", "signals/", 1)


class _ShardTeacher:
    """One actor: loads the teacher once, then turns token shards into signals shards.

    It loads with its first shard: what an actor's constructor raises comes back as the text of a lost actor.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        job["reporter"].started()
        self.engine: LocalTeacher | None = None

    def _load(self) -> "LocalTeacher":
        import torch

        from stages.models.checkpoints import load_model
        from stages.models.compatibility import check_compatible
        from stages.teach.engines.local import LocalTeacher

        job = self.job
        torch.set_num_threads(job["threads"])
        folder, facts = job["teacher"].folder("model"), job["facts"]
        check_compatible("the teacher", folder, facts)
        model = load_model(folder, dtype=job["dtype"], device=job["device"]).eval()
        method = job["method"]
        return LocalTeacher(model, vocabulary=facts["vocabulary_size"], k=method.k, temperatures=method.temperatures)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Teach the shards that a batch names; return facts."""
        facts = [self._teach(str(name)) for name in batch["item"]]
        return {"tokens": [fact["tokens"] for fact in facts]}

    def _teach(self, name: str) -> dict[str, Any]:
        import time

        from stages.teach.shards import teach_shard

        self.engine = self.engine or self._load()
        (path,) = self.job["data"].paths(name)
        started = time.monotonic()
        batch_rows = self.job["micro_batch"] or max(1, BATCH_TOKENS[self.job["device"]] // _row_tokens(path))
        done = teach_shard(path, self.engine.signals, batch_rows=batch_rows, dtype=self.job["dtype"])
        seconds = time.monotonic() - started
        facts = {"rows": done.rows, "tokens": done.tokens, "bytes": len(done.data), "seconds": seconds}
        self.job["shards"].write(_signals_name(name), done.data, facts)
        return facts


def _row_tokens(path: Any) -> int:
    import pyarrow.parquet as pq

    return int(pq.read_schema(path).field("input_ids").type.list_size)


def _map_shards(names: list[str], job: dict[str, Any], context: Context) -> Iterator[dict[str, Any]]:
    """Run the actor pool over shard names with Ray Data; yield facts as shards end.

    The names lie in the object store already, so that nothing but the pool wants a CPU: no read or write task can be
    starved by it. Actors are not restarted, since retries are the engine's.
    """
    import ray
    from ray.util.annotations import RayDeprecationWarning

    quiet_data(ray.data.DataContext.get_current())
    resources = context.resources
    workers = min(resources.workers, len(names))
    shards = ray.data.from_items([{"item": name} for name in names], override_num_blocks=len(names))
    with warnings.catch_warnings():
        # Ray 2.60 deprecates every way to pass `max_restarts`, and names none in their place.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        taught = shards.map_batches(
            _ShardTeacher,
            fn_constructor_args=({**job, "device": "cuda" if resources.gpus_per_worker > 0 else "cpu"},),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=resources.cpus_per_worker,
            num_gpus=resources.gpus_per_worker,
            memory=resources.memory_bytes_per_worker,
            max_restarts=0,
        )
    try:
        yield from taught.iter_rows()
    except ray.exceptions.RayError as error:
        raise translate(error) from error
