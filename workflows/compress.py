"""A user's own checkpoint and texts → candidates: what most people run.

The teacher is read where it lies, and quantized; students, if any, are other checkpoints, or the teacher's own
architecture made smaller and started from its weights, and are quantized too. The quantized teacher stands beside them:
at equal bytes it is what a student has to beat. No teacher is trained and no tokenizer is made.
"""

from itertools import combinations
from typing import Any, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from stages.contract import Config, Resources
from stages.errors import ConfigError
from stages.evaluate.stage import Evaluate
from stages.external.checkpoints import Checkpoint, PretrainedTokenizer
from stages.external.documents import Files
from stages.measure.device import describe_cpu, describe_gpu
from stages.measure.runtimes import measured_runtime, on_device
from stages.measure.stage import Measure
from stages.models.context_length import choose_row_length
from stages.prepare.stage import Overlong, Prepare
from stages.promote.stage import Gate, Promote
from stages.quantize.proposers import Grid
from stages.quantize.schemes import DEFAULT_SCHEMES, Scheme
from stages.quantize.stage import Quantize
from stages.runtime.workers import ComputeDtype, compute_dtype
from stages.teach.stage import Teach, TopK
from stages.train.objectives import CrossEntropy, Objective, SoftTarget
from stages.train.stage import AdamW, Continue, Smaller, Train, Validation
from workflows.engine.graph import Source, Workflow


class StudentSpec(Config):
    """A model that shall learn from the teacher: another checkpoint, or the teacher's architecture made smaller."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    """Names the step `train.<name>` and the candidate."""
    checkpoint: str | None = None
    """Another checkpoint to start from: a folder or a hub id; it must have the teacher's tokenizer."""
    revision: str | None = None
    """The checkpoint's revision on the hub."""
    layers: int | tuple[int, ...] | None = None
    """Layers to keep of the teacher's: how many, or which, counted from 0."""
    heads: int | None = Field(None, ge=1)
    """Attention heads to keep."""
    width: int | None = Field(None, ge=2)
    """Channels to keep of the teacher's hidden size."""
    ffn_width: int | None = Field(None, ge=1)
    """Channels to keep inside the feed-forward blocks."""
    choice: Literal["importance", "position"] = "importance"
    """Whether parts are kept by what they do on the texts, or by their place."""

    def model_post_init(self, _: object) -> None:
        """Refuse a student that is nothing, or two things."""
        if (self.checkpoint is None) == (not self._sizes):
            raise ConfigError(
                f"student {self.name!r} needs either a checkpoint or at least one of layers, heads, width and "
                f"ffn_width; got checkpoint={self.checkpoint!r} and {self._sizes or 'none of them'}"
            )

    @property
    def origin(self) -> Checkpoint | None:
        """The checkpoint that it starts from, where that is not the teacher."""
        return Checkpoint(source=self.checkpoint, revision=self.revision) if self.checkpoint else None

    @property
    def _sizes(self) -> dict[str, Any]:
        return self.model_dump(include={"layers", "heads", "width", "ffn_width"}, exclude_none=True)

    def model(self) -> Continue | Smaller:
        """Return how the student comes from its origin."""
        return Continue() if self.checkpoint else Smaller(**self._sizes, choice=self.choice)


class DataSettings(Config):
    """How the documents are read."""

    sequence_length: int | None = Field(None, ge=16)
    """Tokens in one packed row; if not given, what teacher and students can read, and at most 2048."""
    overlong: Overlong = "reject"
    """Whether a chat or labelled row that is longer than a row is left out, or loses its end."""
    validation_fraction: float = Field(0.05, gt=0, lt=1)
    """Share of the documents that models are compared on, unless `evaluation` is given."""
    calibration_fraction: float | None = Field(None, gt=0, lt=1)
    """Share of the documents to calibrate on; if not given 0.05, and 0.5 where nothing is trained."""
    max_documents: int | None = Field(None, ge=1)
    """Read at most so many documents."""
    text_field: str = "text"
    """The field that holds the text, of rows that are texts."""
    max_rejected_fraction: float = Field(0.01, ge=0, le=1)
    """Share of rows that may be other than the first is; more fail the step."""
    duplicate_similarity: float = Field(0.8, gt=0, le=1)
    """From which on near duplicates stay on one side of the split (Jaccard, runs of five words); 1: equal ones only."""


class TrainingSettings(Config):
    """How students learn: `L = w_ce·CE + w_kd·T²·KL(teacher ‖ student)`."""

    optimizer_steps: int | None = Field(None, ge=1)
    """Of each student; the preset's if not given."""
    batch_rows: int = Field(32, ge=1)
    """Packed rows in one optimizer step, over all workers."""
    learning_rate: float | None = Field(None, gt=0)
    """Peak rate; if not given 1e-4 for students that are cut, and 2e-5 for those that are a checkpoint already."""
    w_ce: float = Field(0.1, ge=0)
    """Weight of the cross-entropy against the text."""
    w_kd: float = Field(0.9, ge=0)
    """Weight of T²·KL against the teacher's stored distribution."""
    temperature: float = Field(1.0, gt=0)
    """T: softens both distributions. One that is not among 1, 2 and 4 is stored with the signals besides, for 4 bytes
    a token; signals that were made without it are made anew."""
    k: int | None = Field(None, ge=1)
    """Teacher log-probabilities kept for each position, the rest is one bucket; the preset's if not given."""

    @model_validator(mode="after")
    def _check_weights(self) -> Self:
        if not self.w_ce and not self.w_kd:
            raise ValueError("w_ce and w_kd are both 0, so that students would learn nothing; set at least one")
        return self

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """The objectives that have any weight."""
        ce = (CrossEntropy(weight=self.w_ce),) if self.w_ce else ()
        kd = (SoftTarget(weight=self.w_kd, temperature=self.temperature),) if self.w_kd else ()
        return (*ce, *kd)

    @property
    def temperatures(self) -> tuple[float, ...]:
        """The temperatures that signals are stored for."""
        return tuple(sorted({*STORED_TEMPERATURES, self.temperature}))


STORED_TEMPERATURES = (1.0, 2.0, 4.0)
"""Stored whatever students ask for, so that the usual ones can be compared without asking the teacher again."""


class HardwareSettings(Config):
    """What a step takes of the cluster."""

    workers: int = Field(1, ge=1)
    """Training ranks, teacher-inference actors, concurrent trials."""
    cpus_per_worker: float = Field(2.0, gt=0)
    """CPU cores each worker takes."""
    gpus_per_worker: float = Field(0.0, ge=0)
    """GPUs each worker takes."""
    micro_batch: int | None = Field(None, ge=1)
    """Rows in one forward pass; the stages choose if not given."""
    dtype: ComputeDtype | None = None
    """What models compute in; bfloat16 on GPUs and float32 on CPUs if not given. Trained weights are float32."""
    device: str | None = None
    """Name of the GPU or CPU whose speed is measured, e.g. 'NVIDIA H200'; this host's if not given."""

    @property
    def resources(self) -> Resources:
        """What a step takes that computes with models."""
        return Resources(**self.model_dump(exclude={"dtype", "device"}))

    @property
    def measured_device(self) -> str:
        """What speed is measured on: it is part of the measurement's identity, so it is named before the run.

        Raises:
            ConfigError: it is not given, and this host has no GPU.
        """
        found = self.device or (describe_gpu() if self.gpus_per_worker else describe_cpu())
        if found is None:
            raise ConfigError(
                f"hardware.gpus_per_worker is {self.gpus_per_worker:g}, and this host has no GPU; if the cluster's "
                "nodes have, name it with --hardware.device, e.g. --hardware.device 'NVIDIA H200', as `nvidia-smi "
                "--query-gpu=name --format=csv` prints it there"
            )
        return found


class Preset(NamedTuple):
    """How much is spent where nothing else is said."""

    optimizer_steps: int
    k: int
    schemes: tuple[Scheme, ...]


QUICK_SCHEMES = (Scheme(weight_bits=8), Scheme(weight_bits=4, group_size=128, algorithm="gptq"))
PRESETS = {
    "quick": Preset(optimizer_steps=200, k=32, schemes=QUICK_SCHEMES),
    "standard": Preset(optimizer_steps=1_000, k=64, schemes=DEFAULT_SCHEMES),
    "thorough": Preset(optimizer_steps=10_000, k=128, schemes=DEFAULT_SCHEMES),
}
"""`quick` shows in minutes whether everything fits together; `thorough` is for a night."""


def compress(
    *,
    teacher: str,
    documents: tuple[str, ...],
    students: tuple[StudentSpec, ...] = (),
    teacher_revision: str | None = None,
    evaluation: tuple[str, ...] = (),
    champion: str | None = None,
    preset: Literal["quick", "standard", "thorough"] = "standard",
    quantize_teacher: bool = True,
    schemes: tuple[Scheme, ...] = (),
    gate: Gate = Gate(),  # noqa: B008  frozen
    data: DataSettings = DataSettings(),  # noqa: B008
    training: TrainingSettings = TrainingSettings(),  # noqa: B008
    hardware: HardwareSettings = HardwareSettings(),  # noqa: B008
    registered_name: str = "compress",
    seed: int = 0,
) -> Workflow:
    """Quantize a checkpoint of your own, and distil smaller ones from it, on texts of your own.

    Args:
        teacher: the checkpoint to compress: a folder with config.json and safetensors, or a hub id.
        documents: files, folders, globs or S3 URIs of text, JSONL or Parquet: texts, chats, prompt-completion rows.
        students: e.g. '{"name": "half", "layers": 6}' or '{"name": "small", "checkpoint": "path"}'; may be repeated.
            With none the teacher is quantized, and nothing is trained.
        teacher_revision: the teacher's revision on the hub.
        evaluation: texts to compare models on; a part of the documents if not given.
        champion: a checkpoint that reigns in the registry (its version's tag `artifact`): scored again as one more
            candidate, so that others may take its place on these texts.
        preset: how much is spent: optimizer steps, k and schemes where they are not given.
        quantize_teacher: whether the teacher is quantized beside its students.
        schemes: quantization schemes to try on each model; the preset's if not given.
        gate: limits that a model must keep to be promoted; without one nothing is, since what may be lost depends on
            what the model is for.
        data: how the documents are read.
        training: how students learn.
        hardware: what a step takes of the cluster.
        registered_name: the model's name in MLflow's registry.
        seed: seed of everything random.
    """
    _check_request(documents, students, quantize_teacher)
    given = Checkpoint(source=teacher, revision=teacher_revision)
    others = {student.name: student.origin for student in students if student.origin}
    row_length = choose_row_length(data.sequence_length, {"teacher": given, **others})
    flow = Workflow("compress", base_model=teacher.rstrip("/").rsplit("/", 1)[-1])
    resources, spent = hardware.resources, PRESETS[preset]
    dtype = compute_dtype(resources, hardware.dtype)
    big = flow.external("teacher", given)
    tokenizer = PretrainedTokenizer(source=teacher, revision=teacher_revision)
    rows = {**dict(data), "sequence_length": row_length}
    rows["calibration_fraction"] = data.calibration_fraction or (0.05 if students else 0.5)
    rows["train_context_fraction"] = 0.0  # a student sees each token once, not again as the context of others
    prepare = Prepare(source=Files(paths=documents), tokenizer=tokenizer, seed=seed, **rows)
    readers = resources.model_copy(update={"gpus_per_worker": 0.0})
    corpus = flow.step("corpus", prepare, resources=readers)
    judged_on = corpus
    if evaluation:
        Files(paths=documents).check_apart(Files(paths=evaluation))
        only: dict[str, Any] = {"validation_fraction": 1.0, "calibration_fraction": 0.0, "max_documents": None}
        only |= {"source": Files(paths=evaluation), "duplicate_similarity": None}  # there is one split only
        judged_on = flow.step("evaluation", prepare.model_copy(update=only), resources=readers)
    signals = None
    if students and training.w_kd:
        teach = Teach(method=TopK(k=training.k or spent.k, temperatures=training.temperatures), dtype=dtype)
        signals = flow.step("signals", teach, teacher=big, data=corpus, resources=resources)
    models: dict[str, Source] = {"teacher": big}
    for student in students:
        origin = flow.external(student.name, student.origin) if student.origin else big
        models[student.name] = flow.step(
            f"train.{student.name}",
            Train(
                model=student.model(),
                objectives=training.objectives,
                optimizer_steps=training.optimizer_steps or spent.optimizer_steps,
                batch_rows=training.batch_rows,
                optimizer=AdamW(learning_rate=training.learning_rate or (2e-5 if student.checkpoint else 1e-4)),
                validation=Validation(times=20, patience=5),
                keep="best",
                dtype=dtype,
                seed=seed,
            ),
            data=corpus,
            signals=signals,
            origin=origin,
            resources=resources,
        )
    target = on_device(gate.runtime, "cuda" if hardware.gpus_per_worker else "cpu")
    gate = gate.model_copy(update={"runtime": target})
    # A model that cannot be quantized is still a candidate: `search.json` says why of each scheme.
    # Limits stay out of its config: who sets one after the figures are there must not search again.
    quantize = Quantize(proposer=Grid(schemes=schemes or spent.schemes), runtime=target, min_done=0, seed=seed)
    models |= {
        f"{name}-quantized": flow.step(f"quantize.{name}", quantize, model=model, data=corpus, resources=resources)
        for name, model in models.items()
        if quantize_teacher or name != "teacher"
    }
    models |= {"champion": flow.external("champion", Checkpoint(source=champion))} if champion else {}
    scores = flow.step(
        "scores",
        Evaluate(dtype=dtype, seed=seed),
        data=judged_on,
        training=corpus if evaluation else None,
        reference=big,
        models=models,
        resources=resources,
    )
    measure = Measure(
        runtime=measured_runtime(target),
        device=hardware.measured_device,
        threads=int(max(1, hardware.cpus_per_worker)),
        prompt_tokens=min(128, row_length // 2),  # together no more than what can read a row can read
        new_tokens=min(32, row_length // 4),
        seed=seed,
    )
    alone = resources.model_copy(update={"workers": 1, "cpus_per_worker": max(1.0, resources.cpus_per_worker)})
    speed = flow.step("speed", measure, models=models, resources=alone)
    flow.step("verdict", Promote(gate=gate, registered_name=registered_name, seed=seed), scores=scores, speed=speed)
    return flow


def _check_request(documents: tuple[str, ...], students: tuple[StudentSpec, ...], quantize_teacher: bool) -> None:
    if not documents:
        raise ConfigError("no documents: give files, folders or globs with --documents")
    if not students and not quantize_teacher:
        raise ConfigError(
            "nothing to do: there are no students and the teacher is not to be quantized; give students, e.g. "
            """--students '{"name": "half", "layers": 6}', or leave --no-quantize-teacher out"""
        )
    names = [student.name for student in students]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"two students are named {min(twice)!r}; each needs a name of its own")
    taken = {"teacher", "champion", *(f"{name}-quantized" for name in ("teacher", *names))}
    if taken := taken & set(names):
        raise ConfigError(f"a student is named {min(taken)!r}, which is the name of another candidate; choose another")
    for one, other in combinations(students, 2):
        if one == other.model_copy(update={"name": one.name}):
            raise ConfigError(f"the students {one.name!r} and {other.name!r} are the same model; leave one out")
