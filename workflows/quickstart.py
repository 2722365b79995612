"""The embedded default, and the tutorial: no download, no GPU, minutes on two cores, real text.

English that every CPython ships → a teacher trained on it → its signals → two students of one architecture, one with
cross-entropy alone and one distilled → a search of quantization schemes on the distilled one → scores, speed, verdict.
"""

from typing import Annotated

from pydantic import Field

from stages.contract import Config, Resources
from stages.errors import ConfigError
from stages.evaluate.stage import Evaluate
from stages.external.documents import PythonDocs
from stages.measure.device import describe_cpu
from stages.measure.stage import Measure
from stages.prepare.stage import ByteLevelBPE, Prepare
from stages.promote.stage import Gate, Promote
from stages.quantize.proposers import Grid
from stages.quantize.schemes import DEFAULT_SCHEMES, Scheme
from stages.quantize.stage import Quantize
from stages.teach.stage import Teach, TopK
from stages.train.objectives import CrossEntropy, Objective, SoftTarget
from stages.train.stage import AdamW, Llama, Train
from workflows.engine.graph import Workflow


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

TWO = Resources(workers=2, cpus_per_worker=1)
"""Two ranks, actors or trials on two cores."""


def quickstart(
    *,
    students: tuple[LossMix, ...] = (PLAIN, DISTILLED),
    teacher: Llama = Llama(layers=3, width=192, heads=4, kv_heads=2, ffn_width=512),  # noqa: B008  frozen
    student: Llama = Llama(layers=2, width=128, heads=4, kv_heads=2, ffn_width=384),  # noqa: B008  frozen
    vocabulary_size: Annotated[int, Field(ge=300, le=65536)] = 2048,
    sequence_length: Annotated[int, Field(ge=16)] = 128,
    max_documents: Annotated[int, Field(ge=20)] | None = None,
    teacher_steps: Annotated[int, Field(ge=1)] = 360,
    student_steps: Annotated[int, Field(ge=1)] = 200,
    batch_rows: Annotated[int, Field(ge=2)] = 16,
    temperature: Annotated[float, Field(gt=0)] = 1.0,
    k: Annotated[int, Field(ge=1)] = 32,
    schemes: tuple[Scheme, ...] = DEFAULT_SCHEMES,
    gate: Gate = Gate(),  # noqa: B008  frozen
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
        temperature: softens both distributions in the KL term; one of 1, 2, 4.
        k: teacher log-probabilities kept for each position; the rest is one bucket.
        schemes: quantization schemes to search.
        gate: what a model must hold to be promoted.
        seed: seed of everything random.
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
            seed=seed,
        ),
        resources=TWO,
    )
    big = flow.step(
        "teacher",
        Train(
            model=teacher,
            objectives=(CrossEntropy(),),
            optimizer_steps=teacher_steps,
            batch_rows=batch_rows,
            optimizer=AdamW(learning_rate=2e-3),
            seed=seed,
        ),
        data=corpus,
        resources=TWO,
    )
    signals = flow.step("signals", Teach(method=TopK(k=k, temperatures=(1.0, 2.0, 4.0))), teacher=big, data=corpus)
    trained = {
        setting.name: flow.step(
            f"train.{setting.name}",
            Train(
                model=student,
                objectives=setting.objectives(temperature),
                optimizer_steps=student_steps,
                batch_rows=batch_rows,
                optimizer=AdamW(learning_rate=6e-3),
                seed=seed,
            ),
            data=corpus,
            signals=signals if setting.w_kd else None,
            resources=TWO,
        )
        for setting in students
    }
    first, last = students[0].name, students[-1].name
    search = flow.step(
        f"quantize.{last}",
        Quantize(proposer=Grid(schemes=schemes), seed=seed),
        model=trained[last],
        data=corpus,
        resources=TWO,
    )
    models = {"teacher": big, **trained, f"{last}-quantized": search}
    scores = flow.step("scores", Evaluate(seed=seed), data=corpus, reference=big, models=models, resources=TWO)
    speed = flow.step(
        "speed",
        Measure(device=describe_cpu(), threads=2, seed=seed),
        models=models,
        resources=Resources(cpus_per_worker=2),
    )
    baseline, contender = (first, last) if first != last else (None, None)
    promote = Promote(gate=gate, baseline=baseline, contender=contender, registered_name="quickstart", seed=seed)
    flow.step("verdict", promote, scores=scores, speed=speed)
    return flow
