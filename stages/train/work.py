"""What one rank of a training does: a student and its data in, the artifact's files out. Imports no ray."""

import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stages.contract import Context, Split
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
from stages.train.loop import Ranks, Training
from stages.train.objectives import Objective
from stages.train.objectives.loss import Loss
from stages.train.progress import Progress
from stages.train.reader import Reader
from stages.train.recipe import Recipe, Validation
from stages.train.students import Llama, Smaller, Student, build_student
from stages.train.validation import HeldOutText
from stages.train.windows import ShardPair, SignalsLayout

MICRO_BATCH_TOKENS = {"cpu": 4096, "cuda": 16384}
"""Tokens in one forward pass where `micro_batch` is not set."""
HELD_OUT_SPLIT: Split = "calibration"
"""The split that the loss is measured on as training goes on: see `stages.train.recipe.Validation`."""


@dataclass(frozen=True, slots=True)
class TrainJob:
    """What travels to the workers."""

    context: Context
    model: Student
    objectives: tuple[Objective, ...]
    recipe: Recipe
    batch_rows: int
    split: Split
    validation: Validation | None
    keeps_best: bool
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
    reader = _reader(job, ranks, dataset.sequence_length)
    training = Training(
        model=model,
        reader=reader,
        loss=_losses(job, ranks, dataset, model, whole_rows=whole_rows),
        recipe=job.recipe,
        reporter=context.reporter,
        ranks=ranks,
        snapshot_writer=snapshots.SnapshotWriter(context.resume) if ranks.rank == 0 else None,
        held_out=_held_out(job, ranks, dataset, reader, whole_rows=whole_rows),
        validation=job.validation or Validation(),
        keeps_best=job.keeps_best,
    )
    training.run(progress, tensors)
    if ranks.rank == 0:
        stored = stored_dtype(origin) if origin else torch.bfloat16
        write_artifact(job, model.to(stored), progress, rows_per_epoch=reader.rows_per_epoch)


def _losses(job: TrainJob, ranks: Ranks, dataset: DatasetInfo, model: Any, *, whole_rows: bool) -> LossSum:
    return LossSum(
        job.objectives,
        dataset.vocabulary_size,
        dtype=job.recipe.dtype,
        teacher=_teacher(job, ranks, dataset),
        whole_rows=whole_rows,
        is_padded=model.config.get_text_config().vocab_size > dataset.vocabulary_size,
        # Mixtures that add this loss by themselves, where they are given labels, keep its weight here.
        router_weight=float(getattr(model, "router_aux_loss_coef", 0.0) or 0.0),
    )


def _held_out(
    job: TrainJob, ranks: Ranks, dataset: DatasetInfo, reader: Reader, *, whole_rows: bool
) -> HeldOutText | None:
    """Return the text that the loss is measured on as training goes on, None where there is none or none is wanted."""
    if job.validation is None:
        return None
    paths = job.context.one("data").paths(shard_pattern(HELD_OUT_SPLIT))
    shards = tuple(ShardPair(path, None) for path in paths)
    rows = num_rows(paths)
    if not rows:
        if job.keeps_best or job.validation.patience:
            raise StageFailed(
                f"the dataset has no text of split {HELD_OUT_SPLIT!r}, on which the best weights are told and training "
                "is ended early; raise Prepare.calibration_fraction, or set keep='last' and no patience"
            )
        if ranks.rank == 0:
            job.context.reporter.note(f"no validation loss: the dataset has no text of split {HELD_OUT_SPLIT!r}")
        return None
    wanted = min(rows, max(ranks.world_size, job.validation.max_tokens // dataset.sequence_length))
    batch_rows = min(wanted, reader.batch_rows)
    held_out = replace(reader, shards=shards, layout=None, batch_rows=batch_rows)
    return HeldOutText(held_out, wanted // batch_rows, dataset.vocabulary_size, job.recipe.dtype, whole_rows)


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
    ids_RT, positions_RT = (torch.tensor(each, device=ranks.device) for each in (rows.ids_RT, rows.positions_RT))
    filled_RT = torch.tensor(rows.document_ids_RT >= 0, device=ranks.device)
    model = load_model(origin, dtype=job.recipe.dtype, device=str(ranks.device))
    whole = keeps_segments_apart(model)
    size = job.context.resources.micro_batch or _most_rows(ranks, dataset.sequence_length)
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


def _most_rows(ranks: Ranks, length: int) -> int:
    """Return the rows of one forward pass where `micro_batch` is not set."""
    return max(1, MICRO_BATCH_TOKENS[ranks.device.type] // length)


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
    largest = _most_rows(ranks, length)
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


def write_artifact(job: TrainJob, model: Any, progress: Progress, *, rows_per_epoch: int) -> None:
    """Write the artifact's files."""
    context, data = job.context, job.context.one("data")
    save_checkpoint(model.eval(), data.folder("tokenizer"), context.out, "model")
    done = TrainingInfo(
        optimizer_steps=progress.step,
        skipped_steps=progress.skipped,
        kept_step=progress.best_step if job.keeps_best else progress.step,
        stopped_early=progress.is_stopped,
        epochs=progress.step * job.batch_rows / rows_per_epoch,
        tokens=progress.tokens,
        targets=progress.targets,
        final_loss=progress.last["train/loss"],
        final=dict(progress.last),
        held_out_cross_entropy=progress.best_held_out if job.keeps_best else progress.held_out,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        seconds=progress.seconds,
        tokens_per_second=progress.tokens / max(progress.seconds, 1e-9),
        wall_seconds=time.time() - job.started,
    )
    done.write(context.out)
    if done.held_out_cross_entropy is not None:
        context.reporter.note(
            f"loss on held-out text {done.held_out_cross_entropy:.4f} nats/token after {done.kept_step} steps; "
            f"trained for {done.epochs:.2f} epochs"
        )
    if done.skipped_steps:
        context.reporter.note(f"{done.skipped_steps} of {done.optimizer_steps} steps skipped: no finite gradient")
