"""What one rank of a training does: a student and its data in, the artifact's files out. Imports no ray."""

import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stages.contract import Artifact, Context, Split
from stages.errors import StageFailed
from stages.formats import signal_shards
from stages.formats.dataset import DatasetInfo
from stages.formats.signals import SignalsInfo
from stages.formats.tokens import num_rows, read_batches, shard_pattern
from stages.formats.training import TrainingInfo
from stages.models.checkpoints import load_model, save_checkpoint, stored_dtype
from stages.models.compatibility import check_compatible
from stages.models.importance import observe_importance
from stages.models.narrowing import Importance
from stages.models.segments import SEGMENTS_ALONE, keeps_segments_apart, row_inputs
from stages.runtime.translation import within_memory
from stages.runtime.workers import WorkerSetup
from stages.train import snapshots
from stages.train.forward import LiveTeacher, LossSum
from stages.train.loop import Progress, Ranks, Training
from stages.train.objectives import Objective
from stages.train.objectives.loss import Loss
from stages.train.optimizer import Recipe
from stages.train.reader import Reader
from stages.train.students import Llama, Smaller, Student, build_student
from stages.train.windows import ShardPair, SignalsLayout

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
    split: Split
    layout: SignalsLayout | None
    """None where no objective learns from signals."""
    snapshot: snapshots.Snapshot | None
    """What to go on from."""
    started: float
    """Unix time."""


def check_inputs(objectives: Sequence[Loss], context: Context) -> SignalsLayout | None:
    """Check the inputs against what the objectives need; return what is to be read of the signals, if anything.

    Raises:
        StageFailed: an input is missing, or the signals are of another dataset or lack what an objective needs.
    """
    for objective in objectives:
        absent = [name for name in objective.NEEDS.inputs if name not in context.inputs]
        if absent:
            raise StageFailed(f"{type(objective).__name__} learns from the input {absent[0]!r}, and there is none")
    wanted = {column for objective in objectives for column in objective.NEEDS.signals}
    if not wanted:
        return None
    signals, dataset = SignalsInfo.read(context.one("signals")), DatasetInfo.read(context.one("data"))
    for name in ("tokenizer_digest", "vocabulary_size", "sequence_length"):
        found, expected = getattr(signals, name), getattr(dataset, name)
        if found != expected:
            raise StageFailed(
                f"{name} of the signals is {found}, expected the dataset's {expected}; run Teach on this dataset"
            )
    for objective in objectives:
        if objective.NEEDS.signals:
            objective.check_signals(signals)
    columns = tuple(column for column in signal_shards.COLUMNS if column in wanted)
    return SignalsLayout(signals.k, signals.temperatures, columns)


def train_rank(job: TrainJob, ranks: Ranks) -> None:
    """Build the student, train, and on rank 0 leave the artifact's files.

    Raises:
        StageFailed: the inputs do not fit the stage.
    """
    context = job.context
    WorkerSetup.of(context).begin()
    data = context.one("data")
    dataset = DatasetInfo.read(data)
    origin = _origin(job)
    importance = _importance(job, ranks, dataset, origin)
    model = build_student(job.model, dataset, origin=origin, seed=job.recipe.seed, importance=importance)
    model = model.to(ranks.device)
    progress, tensors = Progress(), None
    if job.snapshot:
        progress = Progress(step=job.snapshot.step, **job.snapshot.facts)
        tensors = snapshots.read(context.resume, job.snapshot)
    whole_rows = keeps_segments_apart(model)
    if not whole_rows and ranks.rank == 0:
        context.reporter.note(SEGMENTS_ALONE.format("the student"))
    training = Training(
        model=model,
        reader=_reader(job, ranks, dataset.sequence_length),
        loss=LossSum(
            job.objectives,
            dataset.vocabulary_size,
            dtype=job.recipe.dtype,
            teacher=_teacher(job, ranks, dataset),
            whole_rows=whole_rows,
        ),
        recipe=job.recipe,
        reporter=context.reporter,
        ranks=ranks,
        snapshot_writer=snapshots.SnapshotWriter(context.resume) if ranks.rank == 0 else None,
    )
    training.run(progress, tensors)
    if ranks.rank == 0:
        stored = stored_dtype(origin) if origin else torch.float32
        write_artifact(context, model.to(stored), progress, data, time.time() - job.started)


def _origin(job: TrainJob) -> Path | None:
    """Return the folder of the checkpoint that the student comes from, None for a fresh one."""
    if isinstance(job.model, Llama):
        return None
    origin = job.context.optional("origin")
    if origin is None:
        raise StageFailed(f"model is {job.model.kind!r}, which needs a checkpoint, and none is wired; pass origin=")
    return origin.folder("model")


def _importance(job: TrainJob, ranks: Ranks, dataset: DatasetInfo, origin: Path | None) -> Importance | None:
    """Measure what the origin's parts do on the first of the training text, where a student keeps them by that.

    Every rank measures, and takes what rank 0 found, so that all of them build one student.
    """
    if origin is None or not isinstance(job.model, Smaller) or job.model.choice == "position":
        return None
    check_compatible("the student's checkpoint", origin, dataset)
    paths = job.context.one("data").paths(shard_pattern(job.split))
    chosen = np.arange(min(num_rows(paths), max(1, job.model.importance_tokens // dataset.sequence_length)))
    (rows,) = read_batches(paths, chosen, rows_per_batch=len(chosen), columns=("document_ids", "positions"))
    ids_RT, positions_RT = (torch.as_tensor(each, device=ranks.device) for each in (rows.ids_RT, rows.positions_RT))
    filled_RT = torch.as_tensor(rows.document_ids_RT >= 0, device=ranks.device)
    model = load_model(origin, dtype=job.recipe.dtype, device=str(ranks.device))
    whole = keeps_segments_apart(model)
    largest = max(1, MICRO_BATCH_TOKENS[ranks.device.type] // dataset.sequence_length)
    size = job.context.resources.micro_batch or largest
    inputs = row_inputs(ids_RT.long(), positions_RT, filled_RT, whole=whole, batch_rows=size)
    filled = torch.split(filled_RT, size) if whole else [torch.ones_like(each["input_ids"]) for each in inputs]
    with within_memory("measuring what the origin's parts do", micro_batch=size):
        found = observe_importance(model, zip(inputs, filled, strict=True))
    if ranks.world_size > 1:
        for scores in filter(torch.is_tensor, astuple(found)):
            torch.distributed.broadcast(shared := scores.to(ranks.device), src=0)
            scores.copy_(shared)
    return found


def _teacher(job: TrainJob, ranks: Ranks, dataset: DatasetInfo) -> LiveTeacher | None:
    """Load the live teacher, where an objective asks one, in what the forward pass computes in."""
    if not any(objective.NEEDS.teacher for objective in job.objectives):
        return None
    folder = job.context.one("teacher").folder("model")
    check_compatible("the teacher", folder, dataset)
    model = load_model(folder, dtype=job.recipe.dtype, device=str(ranks.device))
    return LiveTeacher(model, dataset.vocabulary_size)


def _reader(job: TrainJob, ranks: Ranks, length: int) -> Reader:
    context = job.context
    paths = context.one("data").paths(shard_pattern(job.split))
    if not paths:
        raise StageFailed(f"the dataset has no shards of split {job.split!r}; set Train.split")
    known = {}
    if job.layout is not None:
        known = {path.name: path for path in context.one("signals").paths(signal_shards.PATTERN)}
        absent = [path.name for path in paths if path.name not in known]
        if absent:
            raise StageFailed(
                f"{len(absent)} of {len(paths)} shards have no signals (the first is {absent[0]}), "
                f"expected one for each; run Teach on this dataset and split"
            )
    largest = max(1, MICRO_BATCH_TOKENS[ranks.device.type] // length)
    rows = -(-job.batch_rows // ranks.world_size)
    return Reader(
        shards=tuple(ShardPair(path, known.get(path.name)) for path in paths),
        layout=job.layout,
        batch_rows=job.batch_rows,
        micro_batch=context.resources.micro_batch or min(rows, largest),
        seed=job.recipe.seed,
        rank=ranks.rank,
        world_size=ranks.world_size,
    )


def write_artifact(context: Context, model: Any, progress: Progress, data: Artifact, wall_seconds: float) -> None:
    """Write the artifact's files."""
    save_checkpoint(model.eval(), data.folder("tokenizer"), context.out, "model")
    TrainingInfo(
        optimizer_steps=progress.step,
        tokens=progress.tokens,
        targets=progress.targets,
        final_loss=progress.last["train/loss"],
        final=dict(progress.last),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        seconds=progress.seconds,
        tokens_per_second=progress.tokens / max(progress.seconds, 1e-9),
        wall_seconds=wall_seconds,
    ).write(context.out)
