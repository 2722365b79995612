"""A workflow of your own. Run it:  stillhouse run my_workflow.py

A workflow is a function that returns a graph of steps. Its keyword parameters are the command's options:
`stillhouse run my_workflow.py --help` lists them with their types, bounds and defaults. Nothing runs while the graph is
built; a variant is another argument, a matrix is a `for` loop.
"""

from typing import Annotated

from pydantic import Field

from stages.contract import Resources
from stages.evaluate.stage import Evaluate
from stages.external.documents import PythonDocs  # or Files(paths=("my/texts/*.jsonl",))
from stages.prepare.stage import ByteLevelBPE, Prepare
from stages.promote.stage import Gate, Promote
from stages.runtime.workers import compute_dtype
from stages.teach.stage import Teach, TopK
from stages.train.objectives import CrossEntropy, SoftTarget
from stages.train.stage import AdamW, Llama, Train
from workflows.engine.graph import Workflow


def my_workflow(
    *,
    layers: tuple[int, ...] = (1, 2),
    optimizer_steps: Annotated[int, Field(ge=1)] = 60,
    seed: int = 0,
) -> Workflow:
    """Distil students of several depths from one teacher.

    Args:
        layers: one student for each of these numbers of layers.
        optimizer_steps: of the teacher and of each student.
        seed: seed of everything random.
    """
    flow = Workflow("my-workflow")  # with the base model's name it would be the MLflow experiment's too

    # Everything that a result depends on is in a stage's config; where and how fast it runs is in `resources`.
    two = Resources(workers=2, cpus_per_worker=1)
    dtype = compute_dtype(two)  # bfloat16 where they have GPUs, float32 on CPUs
    corpus = flow.step(
        "corpus",
        Prepare(
            source=PythonDocs(),
            tokenizer=ByteLevelBPE(vocabulary_size=2048),
            sequence_length=64,
            max_documents=150,
            seed=seed,
        ),
        resources=two,
    )
    teacher = flow.step(
        "teacher",
        Train(
            model=Llama(layers=3, width=128, heads=4),
            objectives=(CrossEntropy(),),
            optimizer_steps=optimizer_steps,
            batch_rows=32,
            optimizer=AdamW(learning_rate=3e-3),
            dtype=dtype,
            seed=seed,
        ),
        data=corpus,
        resources=two,
    )
    # The teacher's distribution is computed once and kept; every student learns from the same signals.
    signals = flow.step("signals", Teach(method=TopK(k=16), dtype=dtype), teacher=teacher, data=corpus)

    models = {"teacher": teacher}
    for depth in layers:
        models[f"layers{depth}"] = flow.step(
            f"train.layers{depth}",
            Train(
                model=Llama(layers=depth, width=64, heads=4),
                objectives=(CrossEntropy(weight=0.1), SoftTarget(weight=0.9, temperature=2.0)),
                optimizer_steps=optimizer_steps,
                batch_rows=32,
                optimizer=AdamW(learning_rate=3e-3),
                dtype=dtype,
                seed=seed,
            ),
            data=corpus,
            signals=signals,
            resources=two,
        )
    scores = flow.step("scores", Evaluate(dtype=dtype, seed=seed), data=corpus, reference=teacher, models=models)
    # Without a limit nothing is promoted. These let a student pass that is smaller than the teacher, and whose
    # perplexity is up to half as large again, which a tutorial can bear; set what your use can.
    limits = Gate(max_perplexity_ratio_to_teacher=1.5, min_compression_x=1.0)
    flow.step("verdict", Promote(gate=limits, registered_name="my-workflow"), scores=scores)
    return flow
