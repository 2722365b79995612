"""What one rank of a training does: a student and its data in, the artifact's files out. Imports no ray."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stages.contract import Artifact, Context
from stages.errors import StageFailed
from stages.models.checkpoints import save_checkpoint, stored_dtype
from stages.train import snapshots
from stages.train.loop import Progress, Ranks, Recipe, Training
from stages.train.objectives import Objective
from stages.train.reader import Reader, ShardPair, SignalsLayout
from stages.train.students import Llama, Smaller, Student, build_student

MICRO_BATCH_TOKENS = {"cpu": 4096, "cuda": 16384}
"""Tokens in one forward pass where `micro_batch` is not set."""


@dataclass(frozen=True, slots=True)
class TrainJob:
    """What travels to the workers."""

    context: Context
    model: Student
    objectives: tuple[Objective, ...]
    recipe: Recipe
    batch_rows: int
    split: str
    layout: SignalsLayout | None
    """None where no objective learns from signals."""
    snapshot: snapshots.Snapshot | None
    """What to go on from."""
    started: float
    """Unix time."""


def train_rank(job: TrainJob, ranks: Ranks) -> None:
    """Build the student, train, and on rank 0 leave the artifact's files.

    Raises:
        StageFailed: the inputs do not fit the stage.
    """
    context = job.context
    context.reporter.started()
    torch.set_num_threads(max(1, int(context.resources.cpus_per_worker)))
    data = context.one("data")
    facts = data.read_json("dataset.json")
    origin = _origin(job)
    model = build_student(job.model, facts, origin=origin, seed=job.recipe.seed).to(ranks.device)
    progress, tensors = Progress(), None
    if job.snapshot:
        progress, tensors = (
            Progress(step=job.snapshot.step, **job.snapshot.facts),
            snapshots.read(context.resume, job.snapshot),
        )
    training = Training(
        model=model,
        reader=_reader(job, ranks, facts["sequence_length"]),
        objectives=job.objectives,
        recipe=job.recipe,
        vocabulary=facts["vocabulary_size"],
        reporter=context.reporter,
        ranks=ranks,
        snapshot_writer=snapshots.SnapshotWriter(context.resume) if ranks.rank == 0 else None,
    )
    training.run(progress, tensors)
    if ranks.rank == 0:
        stored = stored_dtype(origin) if origin else torch.float32
        _write_artifact(context, model.to(stored), progress, data, time.time() - job.started)


def _origin(job: TrainJob) -> Path | None:
    """Return the folder of the checkpoint that the student comes from, None for a fresh one."""
    if isinstance(job.model, Llama):
        return None
    first: Artifact | None = None if isinstance(job.model, Smaller) else job.context.optional("start")
    origin = first or job.context.optional("teacher")
    if origin is None:
        raise StageFailed(f"model is {job.model.kind!r}, which needs a checkpoint, and none is wired; pass teacher=")
    return origin.folder("model")


def _reader(job: TrainJob, ranks: Ranks, length: int) -> Reader:
    context = job.context
    tokens = context.one("data").paths(f"tokens/{job.split}-*.parquet")
    if not tokens:
        raise StageFailed(f"the dataset has no shards of split {job.split!r}; set Train.split")
    known = {}
    if job.layout is not None:
        known = {path.name: path for path in context.one("signals").paths("signals/*.parquet")}
        absent = [path.name for path in tokens if path.name not in known]
        if absent:
            raise StageFailed(
                f"{len(absent)} of {len(tokens)} shards have no signals (the first is {absent[0]}), "
                f"expected one for each; run Teach on this dataset and split"
            )
    largest = max(1, MICRO_BATCH_TOKENS[ranks.device.type] // length)
    rows = -(-job.batch_rows // ranks.world_size)
    return Reader(
        shards=tuple(ShardPair(path, known.get(path.name)) for path in tokens),
        layout=job.layout,
        batch_rows=job.batch_rows,
        micro_batch=context.resources.micro_batch or min(rows, largest),
        seed=job.recipe.seed,
        rank=ranks.rank,
        world_size=ranks.world_size,
    )


def _write_artifact(context: Context, model: Any, progress: Progress, data: Artifact, wall_seconds: float) -> None:
    """Write the artifact's files."""
    save_checkpoint(model.eval(), data.folder("tokenizer"), context.out, "model")
    facts = {
        "optimizer_steps": progress.step,
        "tokens": progress.tokens,
        "targets": progress.targets,
        "final_loss": progress.last["train/loss"],
        "final": dict(progress.last),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": progress.seconds,
        "tokens_per_second": progress.tokens / max(progress.seconds, 1e-9),
        "wall_seconds": wall_seconds,
    }
    context.out.put_json("training.json", facts)
