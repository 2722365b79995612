"""`Train`: a student from a dataset, with a teacher's signals or a live teacher where an objective needs them.

Ray Train places the workers and joins them; retries are the engine's and snapshots are ours, so its own resume, its
checkpoints and its reports are not used.
"""

import logging
import secrets
import tempfile
import time
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from stages.contract import Context, ExternalData, Input, Outcome, Split, Stage
from stages.errors import ConfigError, StageFailed
from stages.formats.training import TrainingInfo
from stages.runtime.processes import environment, preserve_signal_handlers
from stages.runtime.workarounds import TRAIN_ENVIRONMENT, trainer_class
from stages.runtime.workers import device_of, train_resources, translated_errors
from stages.train.objectives import Objective
from stages.train.students import Continue, Llama, Smaller, Student, check_student

if TYPE_CHECKING:
    from stages.train.work import TrainJob

__all__ = ["Continue", "Llama", "Smaller", "Train"]

logger = logging.getLogger(__name__)


class Train(Stage):
    """Dataset, with a teacher's signals or a live teacher where an objective needs them → model.

    Inputs: `origin` is the checkpoint whose weights a student starts from, `teacher` one that is asked as it trains.
    """

    KIND: ClassVar = "model"
    REVISION: ClassVar = "2026-11-25 each segment of a row alone; rows mixed over eight shards"
    PLACES_WORKERS: ClassVar = True
    FRESH_PROCESS: ClassVar = True
    INPUTS: ClassVar = {
        "data": Input(("dataset",)),
        "signals": Input(("signals",), required=False),
        "origin": Input(("model",), required=False),
        "teacher": Input(("model",), required=False),
    }

    model: Student
    """What is trained: `Llama` (fresh), `Smaller` (cut from the input `origin`), `Continue` (the origin as it is)."""
    objectives: tuple[Objective, ...]
    """Losses, summed with their weights."""
    optimizer_steps: int = Field(ge=1)
    """Updates of the weights."""
    batch_rows: int = Field(32, ge=1)
    """Rows of one update over all workers, whatever the micro-batch."""
    learning_rate: float = Field(1e-3, gt=0)
    """Peak rate of AdamW; 1e-3 suits fresh models of some million weights, 1e-5 to 1e-4 checkpoints of billions."""
    warmup_fraction: float = Field(0.05, ge=0, le=1)
    """Share of the steps in which the rate rises linearly."""
    final_fraction: float = Field(0.1, ge=0, le=1)
    """Share of the peak rate at which the cosine ends (arXiv:2203.15556 uses 0.1)."""
    weight_decay: float = Field(0.1, ge=0)
    """AdamW's decay of matrices; vectors are not decayed (arXiv:2005.14165, B)."""
    gradient_clip: float = Field(1.0, ge=0)
    """Largest norm of the gradient; 0 does not clip."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the forward pass computes in; weights, optimizer and losses are float32."""
    split: Split = "train"
    """The split that is trained on."""
    seed: int = 0
    """Of fresh weights, data order and dropout."""

    def check(self, sources: Mapping[str, Stage | ExternalData | Mapping[str, Stage | ExternalData]]) -> None:
        """Check the student and the objectives against what is wired.

        Raises:
            ConfigError: they do not fit.
        """
        if not self.objectives:
            raise ConfigError("objectives is empty, expected at least one of stages.train.objectives")
        check_student(self.model, sources)
        for objective in self.objectives:
            objective.check(sources)
        if "teacher" in sources and not any(objective.NEEDS.teacher for objective in self.objectives):
            raise ConfigError(
                "the input 'teacher' is wired, and no objective asks a live teacher; leave it out (stored signals are "
                "the input 'signals', the checkpoint that a student starts from is the input 'origin')"
            )

    def run(self, context: Context) -> Outcome:
        """Train with Ray Train, going on from the newest snapshot; read back what rank 0 wrote."""
        from stages.train import snapshots
        from stages.train.optimizer import Recipe
        from stages.train.work import TrainJob, check_inputs

        if context.resources.workers > self.batch_rows:
            raise StageFailed(
                f"batch_rows is {self.batch_rows}, expected at least one row for "
                f"each of {context.resources.workers} workers; use fewer workers"
            )
        snapshot = snapshots.newest(context.resume)
        job = TrainJob(
            context,
            model=self.model,
            objectives=self.objectives,
            recipe=Recipe(**{field.name: getattr(self, field.name) for field in fields(Recipe)}),
            batch_rows=self.batch_rows,
            split=self.split,
            layout=check_inputs(self.objectives, context),
            snapshot=snapshot,
            started=time.time(),
        )
        if snapshot:
            logger.info(
                "deciding to go on from step %d of %d, since a snapshot is there", snapshot.step, self.optimizer_steps
            )
        _fit(job)
        done = TrainingInfo.parse(context.out.get(TrainingInfo.FILE), where=TrainingInfo.FILE)
        wanted = ("final_loss", "seconds", "tokens_per_second", "parameters", "tokens")
        return Outcome({f"train/{name}": float(getattr(done, name)) for name in wanted})


def _fit(job: "TrainJob") -> None:
    """Run `_work` on every worker; raise what went wrong as an error of ours."""
    with (
        environment(TRAIN_ENVIRONMENT),
        preserve_signal_handlers(),
        tempfile.TemporaryDirectory(prefix="train-") as storage,
    ):
        from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, TrainingFailedError

        resources = job.context.resources
        trainer = trainer_class()(
            _work,
            train_loop_config={"job": job},
            scaling_config=ScalingConfig(
                num_workers=resources.workers,
                use_gpu=device_of(resources) == "cuda",
                resources_per_worker=train_resources(resources),
            ),
            run_config=RunConfig(
                name=f"{job.context.fingerprint[:16]}-{secrets.token_hex(4)}",
                storage_path=storage,
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
                logging_config=LoggingConfig(log_level="ERROR"),
            ),
        )
        with translated_errors(TrainingFailedError):
            trainer.fit()


def _work(config: dict[str, Any]) -> None:
    """Run one rank, in a worker of Ray Train."""
    import ray.train
    import ray.train.torch

    from stages.train.loop import Ranks
    from stages.train.work import train_rank

    place = ray.train.get_context()
    train_rank(config["job"], Ranks(place.get_world_rank(), place.get_world_size(), ray.train.torch.get_device()))
