"""The embedded default, and the tutorial: no download, no GPU, minutes on two cores, real text.

English that every CPython ships → a teacher trained on it → its signals → two students of one architecture, one with
cross-entropy alone and one distilled → a search of quantization schemes on the distilled one → scores, speed, verdict.

What it shows is meant to be true, with margins (`benchmarks/RESULTS.md` has them, and what else was tried): the teacher
predicts held-out text better than a trigram model of the same tokens, and than the plain student, which is trained as
long as it was; the distilled student does better than the plain one after the same tokens. With less of a teacher all
that follows would be theatre.
"""

from typing import Annotated

from pydantic import Field

from stages.contract import Config, Resources
from stages.errors import ConfigError
from stages.evaluate.stage import Evaluate
from stages.external.documents import PythonDocs
from stages.measure.device import describe_cpu
from stages.measure.runtimes import measured_runtime, on_device
from stages.measure.stage import Measure
from stages.prepare.stage import ByteLevelBPE, Prepare
from stages.promote.stage import Gate, Method, Promote
from stages.quantize.proposers import Grid
from stages.quantize.schemes import Scheme
from stages.quantize.stage import Quantize
from stages.teach.stage import Teach, TopK
from stages.train.objectives import CrossEntropy, Objective, SoftTarget
from stages.train.stage import Llama, Muon, Train, Validation
from workflows.engine.graph import Handle, Source, Workflow


class LossMix(Config):
    """What a student learns from: `L = w_ce·CE + w_kd·T²·KL(teacher ‖ student)`.

    The weights are explicit, since texts define α in opposite ways.
    """

    name: str
    """Names the step `train.<name>` and the candidate."""
    w_ce: float = Field(1.0, ge=0)
    """Weight of the cross-entropy against the text."""
    w_kd: float = Field(0.0, ge=0)
    """Weight of T²·KL against the teacher's stored distribution."""

    def objectives(self, temperature: float) -> tuple[Objective, ...]:
        """Return the objectives that have any weight."""
        ce = (CrossEntropy(weight=self.w_ce),) if self.w_ce else ()
        kd = (SoftTarget(weight=self.w_kd, temperature=temperature),) if self.w_kd else ()
        return (*ce, *kd)


PLAIN = LossMix(name="plain", w_ce=1.0)
DISTILLED = LossMix(name="distilled", w_ce=0.5, w_kd=0.5)

TEACHER = Llama(layers=3, width=192, heads=4, kv_heads=2, ffn_width=512)
STUDENT = Llama(layers=1, width=128, heads=4, kv_heads=2, ffn_width=384)
"""A width of 128, so that the groups of 128 weights that runtimes know fit."""
RATE = Muon(learning_rate=1e-2)
"""In 400 steps Muon brings the teacher far below what AdamW does."""
WARMUP_FRACTION = 0.1
HELD_OUT = Validation(times=4, max_tokens=8192)

SCHEMES = (
    Scheme(weight_bits=8),
    Scheme(weight_bits=8, activation_bits=8),
    Scheme(weight_bits=4, group_size=128, algorithm="gptq", observer="imatrix_mse"),
    Scheme(weight_bits=4, group_size=32, algorithm="gptq", observer="imatrix_mse"),
)
"""What runtimes serve, and no more than minutes allow: `stages.quantize.schemes.DEFAULT_SCHEMES` has them all."""

GATE = Gate(max_kl_to_base=0.02, max_perplexity_ratio_to_teacher=1.2, min_compression_x=4.0)
"""A student of 28 % of the weights may cost a fifth of perplexity (the plain one costs more); quantizing it may add
less than a tenth of the KL that distilling leaves; and below a fourth of the teacher's 16-bit bytes is asked, since a
plain cast of the student has 28 % of them."""

TWO = Resources(workers=2, cpus_per_worker=1)
"""Two ranks, actors or trials on two cores."""


def quickstart(
    *,
    students: tuple[LossMix, ...] = (PLAIN, DISTILLED),
    teacher: Llama = TEACHER,
    student: Llama = STUDENT,
    vocabulary_size: Annotated[int, Field(ge=300, le=65536)] = 2048,
    sequence_length: Annotated[int, Field(ge=16)] = 128,
    max_documents: Annotated[int, Field(ge=20)] | None = None,
    teacher_steps: Annotated[int, Field(ge=1)] = 400,
    student_steps: Annotated[int, Field(ge=1)] = 400,
    batch_rows: Annotated[int, Field(ge=2)] = 16,
    optimizer: Muon = RATE,
    temperature: Annotated[float, Field(gt=0)] = 1.0,
    k: Annotated[int, Field(ge=1)] = 32,
    schemes: tuple[Scheme, ...] = SCHEMES,
    gate: Gate = GATE,
    seeds: Annotated[int, Field(ge=1, le=20)] = 1,
    seed: int = 0,
) -> Workflow:
    """Distil and quantize a small model on text that Python ships.

    Args:
        students: what each student learns from; the last one is quantized, and must beat the first beyond noise.
        teacher: the teacher's architecture.
        student: every student's architecture.
        vocabulary_size: entries of the byte-level BPE tokenizer that is trained.
        sequence_length: tokens in one packed row.
        max_documents: read at most so many documents; all of them if not given.
        teacher_steps: optimizer steps of the teacher.
        student_steps: optimizer steps of each student.
        batch_rows: packed rows in one optimizer step, over all workers.
        optimizer: what moves the weights of the teacher and of each student.
        temperature: softens both distributions in the KL term; one of 1, 2, 4.
        k: teacher log-probabilities kept for each position; the rest is one bucket.
        schemes: quantization schemes to search.
        gate: limits that a model must keep to be promoted.
        seeds: train each student so often, from seeds of its own; the first is quantized. With one, the claim is about
            two checkpoints; from three on it is about two ways to train.
        seed: seed of everything random; of several trainings of a student the first one's.
    """
    if not students:
        raise ConfigError("""no students: give at least one, e.g. --students '{"name": "plain"}'""")
    flow = Workflow("quickstart", base_model="python-docs")
    corpus = flow.step(
        "corpus",
        Prepare(
            source=PythonDocs(),
            tokenizer=ByteLevelBPE(vocabulary_size=vocabulary_size),
            sequence_length=sequence_length,
            max_documents=max_documents,
            validation_fraction=0.1,
            train_context_fraction=0.0,  # twice the targets for the same seconds
            seed=seed,
        ),
        resources=TWO,
    )
    training = Train(
        model=teacher,
        objectives=(CrossEntropy(),),
        optimizer_steps=teacher_steps,
        batch_rows=batch_rows,
        optimizer=optimizer,
        warmup_fraction=WARMUP_FRACTION,
        decay="linear",
        final_fraction=0.0,
        validation=HELD_OUT,
        seed=seed,
    )
    big = flow.step("teacher", training, data=corpus, resources=TWO)
    signals = flow.step("signals", Teach(method=TopK(k=k, temperatures=(1.0, 2.0, 4.0))), teacher=big, data=corpus)
    trained: dict[str, Handle] = {}
    for setting in students:
        objectives = setting.objectives(temperature)
        changed = {"model": student, "objectives": objectives, "optimizer_steps": student_steps}
        for number, name in enumerate(names_of(setting, seeds, seed)):
            trained[name] = flow.step(
                f"train.{name}",
                training.model_copy(update={**changed, "seed": seed + number}),
                data=corpus,
                signals=signals if setting.w_kd else None,
                resources=TWO,
            )
    first, last = students[0], students[-1]
    target = on_device(gate.runtime, "cpu")
    search = flow.step(
        f"quantize.{last.name}",
        Quantize(proposer=Grid(schemes=schemes), runtime=target, seed=seed),
        model=trained[last.name],
        data=corpus,
        resources=TWO,
    )
    models: dict[str, Source] = {"teacher": big, **trained, f"{last.name}-quantized": search}
    scores = flow.step("scores", Evaluate(seed=seed), data=corpus, reference=big, models=models, resources=TWO)
    speed = flow.step(
        "speed",
        Measure(runtime=measured_runtime(target), device=describe_cpu(), threads=2, seed=seed),
        models=models,
        resources=Resources(cpus_per_worker=2),
    )
    sides = [Method(name=side.name, models=names_of(side, seeds, seed)) for side in (first, last)]
    baseline, contender = sides if first != last else (None, None)
    gate = gate.model_copy(update={"runtime": target})
    promote = Promote(gate=gate, baseline=baseline, contender=contender, registered_name="quickstart", seed=seed)
    flow.step("verdict", promote, scores=scores, speed=speed)
    return flow


def names_of(student: LossMix, seeds: int, seed: int) -> tuple[str, ...]:
    """Return the names of a student's trainings; the first one's is the same however many there are."""
    return (student.name, *(f"{student.name}-seed{seed + number}" for number in range(1, seeds)))
