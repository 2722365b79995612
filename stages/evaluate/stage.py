"""Score models on held-out text: perplexity, KL divergence from a reference, top-1 agreement, sums for each document.

One pass for each model over the same packed rows, each a Ray task; the reference's distributions are computed once and
reach the other tasks through Ray's object store (see `scoring.py`). Quality does not depend on the machine; speed is
measured elsewhere. Quantized checkpoints are unpacked by transformers, which keeps their numbers.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from stages.contract import Artifact, Context, ExternalData, Input, Kind, Outcome, Split, Stage
from stages.runtime.workers import WorkerSetup, fetch_result, remote_task

if TYPE_CHECKING:
    from stages.evaluate.passes import Pass
    from stages.evaluate.scores import Scored

__all__ = ["Evaluate"]

TOKENS_PER_BATCH = 4096
"""Tokens in one forward pass where the resources name no micro-batch: enough to keep a GPU busy."""


class Evaluate(Stage):
    """Scores of each model on a dataset's split."""

    KIND: ClassVar[Kind] = "scores"
    REVISION: ClassVar[str] = (
        "2026-11-25 each segment of a row alone, n-grams, noise floor, bits per byte, ties, compression against 16 bits"
    )
    PLACES_WORKERS: ClassVar = True
    INPUTS: ClassVar[Mapping[str, Input]] = {
        "data": Input(("dataset",)),
        "reference": Input(("model",)),
        "models": Input(("model", "search"), many=True),
        "training": Input(("dataset",), required=False),
    }

    split: Split = "validation"
    """The split that is scored; nothing may have been trained, calibrated or chosen on it."""
    max_rows: int | None = Field(None, ge=1)
    """Packed rows to score, drawn without replacement; None scores all of them."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of weights and activations, for all models; log-probabilities are always float32. With bfloat16
    the rounding alone makes a KL of some 1e-4 nats."""
    seed: int = 0
    """Seed of the draw of rows."""

    def check(self, sources: Mapping[str, Stage | ExternalData | Mapping[str, Stage | ExternalData]]) -> None:
        """Check the checkpoints that are wired against the dataset.

        Raises:
            ConfigError: one does not fit.
        """
        from stages.models.compatibility import check_planned

        check_planned(sources, self.INPUTS, unquantized=("reference",))

    def run(self, context: Context) -> Outcome:
        """Score every model.

        Raises:
            StageFailed: a model's vocabulary does not fit, or its figures are not finite.
            OutOfMemory: a smaller micro-batch may help.
        """
        from stages.candidates import read_candidates
        from stages.evaluate.passes import plan_passes
        from stages.evaluate.rows import rows_of_split
        from stages.evaluate.scores import build_documents, build_scores
        from stages.evaluate.text import examine_text
        from stages.formats.documents import write_documents

        data, reference = context.one("data"), context.one("reference")
        _, rows = rows_of_split(data, self.split, max_rows=self.max_rows, seed=self.seed)
        passes = plan_passes(read_candidates(context.many("models")), reference)
        training = context.optional("training") or data
        examined = remote_task(examine_text, context).remote(
            data, training, self.split, max_rows=self.max_rows, seed=self.seed
        )
        scored = _run_passes(passes, self, context)
        scores = build_scores(
            scored,
            fetch_result(examined),
            split=self.split,
            dtype=self.dtype,
            rows=len(rows),
            data=data,
            reference=reference,
        )
        scores.write(context.out)
        write_documents(context.out, build_documents(scored))
        metrics: dict[str, float] = {"tokens": scores.tokens, "documents": scores.documents}
        for what in ("bigram", "trigram"):
            if (ngram := getattr(scores, what)) is not None:
                metrics[f"perplexity/{what}"] = ngram.perplexity
        for name, entry in scores.models.items():
            metrics[f"perplexity/{name}"] = entry.perplexity
            metrics[f"kl_to_reference/{name}"] = entry.kl_to_reference
        return Outcome(metrics)


@dataclass(frozen=True, slots=True)
class EvaluateJob:
    """What every pass needs to know; picklable."""

    config: Evaluate
    data: Artifact
    micro_batch: int | None
    setup: WorkerSetup


def _run_passes(passes: "list[Pass]", config: Evaluate, context: Context) -> "list[Scored]":
    """Run the passes as Ray tasks, `workers` at once, each when those it depends on are done."""
    import ray

    resources = context.resources
    job = EvaluateJob(config, context.one("data"), resources.micro_batch, WorkerSetup.of(context))
    # A streaming generator's values belong to the caller; what a task `put`s itself is lost when its worker goes idle.
    task = remote_task(_score, context, num_returns="streaming")
    waiting = list(passes)
    running: dict[Any, tuple[Pass, Any]] = {}
    kept: dict[str, list[Any]] = {}
    done: dict[str, Scored] = {}
    try:
        while waiting or running:
            ready = [one for one in waiting if all(name in kept for name in one.against)]
            for one in ready[: resources.workers - len(running)]:
                waiting.remove(one)
                stream = task.remote(one, job, {name: kept[name] for name in one.against})
                running[stream.completed()] = (one, stream)
            (finished,), _ = ray.wait(list(running), num_returns=1)
            one, stream = running.pop(finished)
            *states, facts = list(stream)
            scored = fetch_result(facts)
            name = one.candidate.name
            kept[name], done[name] = states, scored
            context.reporter.progress(len(done), len(passes), "models")
            context.reporter.note(f"{name}: {scored.total('nll') / scored.total('tokens'):.4f} nats per token")
    except BaseException:
        for _, stream in running.values():
            ray.cancel(stream)
        raise
    return [done[one.candidate.name] for one in passes]


def _score(one: "Pass", job: EvaluateJob, kept: Mapping[str, list[Any]]) -> Iterator[Any]:
    """Score one model in a worker; yield its output head and states where others need them, then what was found."""
    from itertools import chain

    import torch

    from stages.errors import StageFailed
    from stages.evaluate.checkpoint_facts import count_parameters, read_axes
    from stages.evaluate.rows import rows_of_split
    from stages.evaluate.scores import Scored
    from stages.evaluate.scoring import DocumentSums, NoiseFloor, score_batches
    from stages.formats.dataset import DatasetInfo
    from stages.formats.tokens import read_batches
    from stages.models.checkpoints import load_model
    from stages.models.compatibility import check_compatible
    from stages.models.heads import PackedTensor, observe_head
    from stages.models.segments import SEGMENTS_ALONE

    candidate, config, device = one.candidate, job.config, job.setup.device
    folder = candidate.artifact.folder(candidate.folder)
    dataset = DatasetInfo.read(job.data)
    check_compatible(f"the candidate {candidate.name!r}", folder, dataset)
    model = load_model(folder, dtype=config.dtype, device=device)
    paths, rows = rows_of_split(job.data, config.split, max_rows=config.max_rows, seed=config.seed)
    rows_per_batch = job.micro_batch or max(1, TOKENS_PER_BATCH // dataset.sequence_length)
    batches = read_batches(
        paths, rows, rows_per_batch=rows_per_batch, columns=("document_ids", "loss_mask", "positions")
    )
    first = next(batches, None)
    if first is None:
        raise StageFailed(f"the dataset's split {config.split!r} has no rows; expected text to score")
    head = observe_head(model, torch.as_tensor(first.ids_RT, device=device).long(), dataset.vocabulary_size)
    if not head.whole_rows:
        job.setup.reporter.note(SEGMENTS_ALONE.format(candidate.name))
    if one.keep:
        if not head.is_replayed:
            job.setup.reporter.note(
                f"{candidate.name}: its output head cannot be replayed, so {dataset.vocabulary_size} logits of every "
                "token are kept to compare others with; Evaluate.max_rows bounds them"
            )
        yield head.pack()
    sums, floor = DocumentSums(), None if one.against else NoiseFloor()
    for states in score_batches(
        model,
        head,
        chain([first], batches),
        references={name: _reference(refs, device) for name, refs in kept.items()},
        sums=sums,
        name=candidate.name,
        floor=floor,
    ):
        if one.keep:
            yield PackedTensor.of(states)
    if not sums.sums:
        raise StageFailed(f"the rows of split {config.split!r} hold no targets; expected text that is to be predicted")
    own = None if floor is None else floor.sums
    yield Scored(candidate, sums.arrays(), count_parameters(folder), read_axes(folder), own)


def _reference(refs: list[Any], device: str) -> Any:
    """Return a distribution that an earlier task kept; its states are fetched one batch at a time."""
    import ray

    from stages.evaluate.scoring import Reference

    head = ray.get(refs[0]).unpack(device)
    return Reference(head, (ray.get(ref).tensor(device) for ref in refs[1:]))
