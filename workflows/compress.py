"""A user's own checkpoint and texts → candidates: what most people run.

The teacher is read where it lies; students are other checkpoints, or the teacher's own architecture made smaller and
started from its weights. No teacher is trained and no tokenizer is made.
"""

from contextlib import suppress
from itertools import combinations
from typing import Annotated

from pydantic import Field

from stages.contract import Config, Resources
from stages.errors import ConfigError, ExternalDataError
from stages.evaluate.stage import Evaluate
from stages.external.checkpoints import Checkpoint, PretrainedTokenizer
from stages.external.documents import Files
from stages.measure.device import describe_cpu, describe_gpu
from stages.measure.stage import Measure
from stages.models.context_length import longest_context
from stages.prepare.stage import Overlong, Prepare
from stages.promote.stage import Gate, Promote
from stages.quantize.proposers import Grid
from stages.quantize.schemes import DEFAULT_SCHEMES, Scheme
from stages.quantize.stage import Quantize
from stages.teach.stage import Teach, TopK
from stages.train.objectives import CrossEntropy, Objective, SoftTarget
from stages.train.stage import Continue, Smaller, Train
from workflows.engine.graph import Handle, Source, Workflow


class StudentSpec(Config):
    """A model that shall learn from the teacher: another checkpoint, or the teacher's architecture made smaller."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    """Names the step `train.<name>` and the candidate."""
    checkpoint: str | None = None
    """Another checkpoint to start from: a folder or a hub id; it must have the teacher's tokenizer."""
    revision: str | None = None
    """The checkpoint's revision on the hub."""
    layers: int | None = Field(None, ge=1)
    """Layers to keep of the teacher's, evenly spaced."""
    heads: int | None = Field(None, ge=1)
    """Attention heads to keep."""
    width: int | None = Field(None, ge=2)
    """Channels to keep of the teacher's hidden size."""

    def model_post_init(self, _: object) -> None:
        """Refuse a student that is nothing, or two things."""
        sizes = (self.layers, self.heads, self.width)
        if (self.checkpoint is None) == (sizes == (None, None, None)):
            raise ConfigError(
                f"student {self.name!r} needs either a checkpoint or at least one of layers, heads and width; "
                f"got checkpoint={self.checkpoint!r}, layers={self.layers}, heads={self.heads}, width={self.width}"
            )

    def model(self) -> Continue | Smaller:
        """Return how the student comes from its origin."""
        return Continue() if self.checkpoint else Smaller(layers=self.layers, heads=self.heads, width=self.width)


def compress(
    *,
    teacher: str,
    documents: tuple[str, ...],
    students: tuple[StudentSpec, ...],
    teacher_revision: str | None = None,
    evaluation: tuple[str, ...] = (),
    sequence_length: Annotated[int, Field(ge=16)] | None = None,
    overlong: Overlong = "reject",
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05,
    calibration_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05,
    max_documents: Annotated[int, Field(ge=1)] | None = None,
    text_field: str = "text",
    max_rejected_fraction: Annotated[float, Field(ge=0, le=1)] = 0.01,
    optimizer_steps: Annotated[int, Field(ge=1)] = 1000,
    batch_rows: Annotated[int, Field(ge=1)] = 32,
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4,
    w_ce: Annotated[float, Field(ge=0)] = 0.1,
    w_kd: Annotated[float, Field(ge=0)] = 0.9,
    temperature: Annotated[float, Field(gt=0)] = 1.0,
    k: Annotated[int, Field(ge=1)] = 64,
    schemes: tuple[Scheme, ...] = DEFAULT_SCHEMES,
    gate: Gate = Gate(),  # noqa: B008  frozen
    workers: Annotated[int, Field(ge=1)] = 1,
    cpus_per_worker: Annotated[float, Field(gt=0)] = 2.0,
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0.0,
    micro_batch: Annotated[int, Field(ge=1)] | None = None,
    device: str | None = None,
    registered_name: str = "compress",
    seed: int = 0,
) -> Workflow:
    """Distil and quantize a checkpoint of your own on texts of your own.

    Args:
        teacher: the checkpoint to compress: a folder with config.json and safetensors, or a hub id.
        documents: files, folders, globs or S3 URIs of text, JSONL or Parquet: texts, chats, prompt-completion rows.
        students: e.g. '{"name": "half", "layers": 6}' or '{"name": "small", "checkpoint": "path"}'; may be repeated.
        teacher_revision: the teacher's revision on the hub.
        evaluation: texts to compare models on; a part of the documents if not given.
        sequence_length: tokens in one packed row; if not given, what teacher and students can read, and at most 2048.
        overlong: whether a chat or labelled row that is longer than a row is left out, or loses its end.
        validation_fraction: share of the documents that models are compared on, unless evaluation is given.
        calibration_fraction: share of the documents that quantization looks at.
        max_documents: read at most so many documents.
        text_field: the field that holds the text, of rows that are texts.
        max_rejected_fraction: share of rows that may be other than the first is; more fail the step.
        optimizer_steps: of each student.
        batch_rows: packed rows in one optimizer step, over all workers.
        learning_rate: peak rate of each student.
        w_ce: weight of the cross-entropy against the text.
        w_kd: weight of T²·KL(teacher ‖ student) against the teacher's stored distribution.
        temperature: softens both distributions in the KL term; one of 1, 2, 4.
        k: teacher log-probabilities kept for each position; the rest is one bucket.
        schemes: quantization schemes to try on each student.
        gate: what a model must hold to be promoted.
        workers: training ranks, teacher-inference actors, concurrent trials.
        cpus_per_worker: CPU cores each of them takes.
        gpus_per_worker: GPUs each of them takes.
        micro_batch: rows in one forward pass; the stages choose if not given.
        device: name of the GPU or CPU whose speed is measured, e.g. 'NVIDIA H200'; this host's if not given.
        registered_name: the model's name in MLflow's registry.
        seed: seed of everything random.
    """
    _check_request(documents, students, w_ce, w_kd)
    sequence_length = _row_length(sequence_length, Checkpoint(source=teacher, revision=teacher_revision), students)
    flow = Workflow("compress", base_model=teacher.rstrip("/").rsplit("/", 1)[-1])
    resources = Resources(
        workers=workers, cpus_per_worker=cpus_per_worker, gpus_per_worker=gpus_per_worker, micro_batch=micro_batch
    )
    big = flow.external("teacher", Checkpoint(source=teacher, revision=teacher_revision))
    words = PretrainedTokenizer(source=teacher, revision=teacher_revision)
    corpus = flow.step(
        "corpus",
        Prepare(
            source=Files(paths=documents),
            tokenizer=words,
            sequence_length=sequence_length,
            overlong=overlong,
            validation_fraction=validation_fraction,
            calibration_fraction=calibration_fraction,
            max_documents=max_documents,
            text_field=text_field,
            max_rejected_fraction=max_rejected_fraction,
            seed=seed,
        ),
        resources=Resources(workers=workers, cpus_per_worker=cpus_per_worker),
    )
    judged_on = corpus
    if evaluation:
        prepare = Prepare(
            source=Files(paths=evaluation),
            tokenizer=words,
            sequence_length=sequence_length,
            overlong=overlong,
            validation_fraction=1.0,
            calibration_fraction=0.0,
            text_field=text_field,
            max_rejected_fraction=max_rejected_fraction,
            seed=seed,
        )
        judged_on = flow.step("evaluation", prepare)
    signals = None
    if w_kd:
        teach = Teach(method=TopK(k=k, temperatures=(1.0, 2.0, 4.0)))
        signals = flow.step("signals", teach, teacher=big, data=corpus, resources=resources)
    trained: dict[str, Handle] = {}
    for student in students:
        origin = big
        if student.checkpoint:
            origin = flow.external(student.name, Checkpoint(source=student.checkpoint, revision=student.revision))
        trained[student.name] = flow.step(
            f"train.{student.name}",
            Train(
                model=student.model(),
                objectives=_objectives(w_ce, w_kd, temperature),
                optimizer_steps=optimizer_steps,
                batch_rows=batch_rows,
                learning_rate=learning_rate,
                seed=seed,
            ),
            data=corpus,
            signals=signals,
            origin=origin,
            resources=resources,
        )
    # A student that cannot be quantized is still a candidate: `search.json` says why of each scheme.
    max_kl = gate.max_kl_to_base or Quantize.model_fields["max_kl"].default
    searches = {
        f"{name}-quantized": flow.step(
            f"quantize.{name}",
            Quantize(proposer=Grid(schemes=schemes), max_kl=max_kl, min_done=0, seed=seed),
            model=model,
            data=corpus,
            resources=resources,
        )
        for name, model in trained.items()
    }
    models: dict[str, Source] = {"teacher": big, **trained, **searches}
    scores = flow.step("scores", Evaluate(seed=seed), data=judged_on, reference=big, models=models, resources=resources)
    measure = Measure(
        device=device or _device(gpus_per_worker),
        threads=int(max(1, cpus_per_worker)),
        prompt_tokens=min(128, sequence_length // 2),  # no more than every teacher that can read a row can read
        new_tokens=min(32, sequence_length // 4),
        seed=seed,
    )
    alone = resources.model_copy(update={"workers": 1})
    speed = flow.step("speed", measure, models=models, resources=alone)
    flow.step("verdict", Promote(gate=gate, registered_name=registered_name, seed=seed), scores=scores, speed=speed)
    return flow


LONGEST_ROW = 2048
"""Tokens of a row where none are asked for: what papers calibrate and evaluate on, at bearable memory."""


def _row_length(given: int | None, teacher: Checkpoint, students: tuple[StudentSpec, ...]) -> int:
    """Return the tokens of a row: those that are given, or what all checkpoints can read.

    Raises:
        ConfigError: more are given than a checkpoint can read.
    """
    checkpoints = {"the teacher": teacher}
    for student in students:
        if student.checkpoint:
            other = Checkpoint(source=student.checkpoint, revision=student.revision)
            checkpoints[f"the student {student.name!r}"] = other
    lengths = [LONGEST_ROW if given is None else given]
    for what, checkpoint in checkpoints.items():
        with suppress(ExternalDataError):  # raised where its identity is asked for
            context = longest_context(checkpoint.config(ask_hub=True) or {})
            if given is not None and context is not None and context < given:
                raise ConfigError(
                    f"sequence_length is {given}, and {what} ({checkpoint.source}) reads at most {context} tokens; "
                    f"set it to {context} or less, or leave it out"
                )
            lengths += [] if context is None else [context]
    return min(lengths)


def _device(gpus_per_worker: float) -> str:
    """Return what speed is measured on: it is part of the measurement's identity, so it is named before the run."""
    found = describe_gpu() if gpus_per_worker else describe_cpu()
    if found is None:
        raise ConfigError(
            f"gpus_per_worker is {gpus_per_worker:g}, and this host has no GPU; if the cluster's nodes have, name it "
            "with --device, e.g. --device 'NVIDIA H200', as `nvidia-smi --query-gpu=name --format=csv` prints it there"
        )
    return found


def _objectives(w_ce: float, w_kd: float, temperature: float) -> tuple[Objective, ...]:
    ce = (CrossEntropy(weight=w_ce),) if w_ce else ()
    kd = (SoftTarget(weight=w_kd, temperature=temperature),) if w_kd else ()
    return (*ce, *kd)


def _check_request(documents: tuple[str, ...], students: tuple[StudentSpec, ...], w_ce: float, w_kd: float) -> None:
    if not students:
        raise ConfigError("""no students: give at least one, e.g. --students '{"name": "half", "layers": 6}'""")
    if not documents:
        raise ConfigError("no documents: give files, folders or globs with --documents")
    names = [student.name for student in students]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"two students are named {twice[0]!r}; each needs a name of its own")
    if taken := sorted({"teacher", *(f"{name}-quantized" for name in names)} & set(names)):
        raise ConfigError(f"a student is named {taken[0]!r}, which is the name of another candidate; choose another")
    for one, other in combinations(students, 2):
        if one == other.model_copy(update={"name": one.name}):
            raise ConfigError(f"the students {one.name!r} and {other.name!r} are the same model; leave one of them out")
    if not w_ce and not w_kd:
        raise ConfigError("w_ce and w_kd are both 0, so that students would learn nothing; set at least one")
