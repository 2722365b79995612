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
from stages.train.recipe import AdamW, Decay, Muon, OptimizerSettings, Recipe, Validation
from stages.train.students import Continue, Llama, Smaller, Student, check_student

if TYPE_CHECKING:
    from stages.train.work import TrainJob

__all__ = ["AdamW", "Continue", "Llama", "Muon", "Smaller", "Train", "Validation"]

logger = logging.getLogger(__name__)

FIGURES = (
    *("final_loss", "seconds", "tokens_per_second", "parameters", "tokens"),
    *("epochs", "optimizer_steps", "kept_step", "skipped_steps"),
)
"""Of `training.json`, in the step's metrics."""


class Train(Stage):
    """Dataset, with a teacher's signals or a live teacher where an objective needs them → model.

    Inputs: `origin` is the checkpoint whose weights a student starts from, `teacher` one that is asked as it trains.
    """

    KIND: ClassVar = "model"
    REVISION: ClassVar = (
        "2026-11-25 AdamW or Muon; skipped steps; embeddings not decayed; fresh students in bfloat16; each segment of "
        "a row alone; rows mixed over eight shards"
    )
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
    optimizer: OptimizerSettings = AdamW()
    """What moves the weights: `AdamW(…)`, or `Muon(…)`, which learns more in few steps from fresh weights."""
    warmup_fraction: float = Field(0.05, ge=0, le=1)
    """Share of the steps in which the rate rises linearly."""
    decay: Decay = "cosine"
    """How the rate falls after that."""
    final_fraction: float = Field(0.1, ge=0, le=1)
    """Share of the peak rate at which it ends (arXiv:2203.15556 uses 0.1)."""
    gradient_clip: float = Field(1.0, ge=0)
    """Largest norm of the gradient; 0 does not clip."""
    max_skipped_fraction: float = Field(0.01, ge=0, le=1)
    """Share of the steps whose gradient may be other than finite: such a step changes nothing. More of them fail."""
    validation: Validation | None = Validation()
    """The loss on held-out text as training goes on: how often, on how much, and whether it ends training early."""
    keep: Literal["last", "best"] = "last"
    """Which weights are kept: the last, or those with the lowest loss on the held-out text."""
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
        from stages.models.compatibility import check_planned

        self._check_validation(sources)
        check_student(self.model, sources)
        check_planned(sources, self.INPUTS, unquantized=("teacher", "origin"))
        for objective in self.objectives:
            objective.check(sources)
        if "teacher" in sources and not any(objective.NEEDS.teacher for objective in self.objectives):
            raise ConfigError(
                "the input 'teacher' is wired, and no objective asks a live teacher; leave it out (stored signals are "
                "the input 'signals', the checkpoint that a student starts from is the input 'origin')"
            )

    def _check_validation(self, sources: Mapping[str, Any]) -> None:
        if self.validation is None and self.keep == "best":
            raise ConfigError("keep is 'best' and validation is None, so that no weights are the best; set one of them")
        if self.validation is not None and self.split == "calibration":
            raise ConfigError(
                "split is 'calibration', which is the text that validation measures the loss on; set validation=None"
            )
        # The source is a Prepare, whose class no other stage may import; the run checks what has no fraction.
        without = getattr(sources.get("data"), "calibration_fraction", None) == 0
        if without and self.validation is not None and (self.keep == "best" or self.validation.patience):
            raise ConfigError(
                "keep='best' and validation.patience need held-out text, and the dataset's calibration_fraction is 0; "
                "raise it, or set keep='last' and no patience"
            )

    def run(self, context: Context) -> Outcome:
        """Train with Ray Train, going on from the newest snapshot; read back what rank 0 wrote."""
        from stages.train import snapshots
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
            validation=self.validation,
            keeps_best=self.keep == "best",
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
        found = {f"train/{name}": float(getattr(done, name)) for name in FIGURES}
        if done.held_out_cross_entropy is not None:
            found["validation/cross_entropy"] = done.held_out_cross_entropy
        return Outcome(found)


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
