"""Score models on held-out text: perplexity, KL divergence from a reference, top-1 agreement, sums for each document.

One pass for each model over the same packed rows, each a Ray task; the reference's distributions are computed once and
reach the other tasks through Ray's object store (see `scoring.py`). Quality does not depend on the machine; speed is
measured elsewhere. Quantized checkpoints are unpacked by transformers, which keeps their numbers.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from stages.contract import Artifact, Context, Input, Kind, Outcome, Reporter, Split, Stage

if TYPE_CHECKING:
    from stages.evaluate.passes import Pass
    from stages.evaluate.scores import Scored

__all__ = ["Evaluate"]

TOKENS_PER_BATCH = 4096
"""Tokens in one forward pass where the resources name no micro-batch: enough to keep a GPU busy."""


class Evaluate(Stage):
    """Scores of each model on a dataset's split."""

    KIND: ClassVar[Kind] = "scores"
    REVISION: ClassVar[str] = "2026-11-21 first"
    PLACES_WORKERS: ClassVar = True
    INPUTS: ClassVar[Mapping[str, Input]] = {
        "data": Input(("dataset",)),
        "reference": Input(("model",)),
        "models": Input(("model", "search"), many=True),
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

    def run(self, context: Context) -> Outcome:
        """Score every model.

        Raises:
            StageFailed: a model's vocabulary does not fit, or its figures are not finite.
            OutOfMemory: a smaller micro-batch may help.
        """
        import pyarrow.parquet as pq

        from stages.candidates import read_candidates
        from stages.evaluate.passes import plan_passes
        from stages.evaluate.scores import build_documents, build_scores

        reference = context.one("reference")
        passes = plan_passes(read_candidates(context.many("models")), reference)
        scored = _run_passes(passes, _work(self, context), context)
        models, documents = build_scores(scored), build_documents(scored)
        tokens, num_documents = int(scored[0].total("tokens")), len(scored[0].sums["document_id"])
        first = scored[0].candidate
        scores = {
            "split": self.split,
            "dtype": self.dtype,
            "tokens": tokens,
            "documents": num_documents,
            "rows": len(_chosen_rows(self, context.one("data"))),
            "dataset_fingerprint": context.one("data").fingerprint,
            "reference": first.name if first.name in models else None,
            "reference_fingerprint": reference.fingerprint,
            "reference_bytes": first.size_bytes,
            "models": models,
        }
        context.out.put_json("scores.json", scores)
        context.out.put("documents.parquet", _to_parquet(pq, documents))
        metrics: dict[str, float] = {"tokens": tokens, "documents": num_documents}
        for name, entry in models.items():
            metrics[f"perplexity/{name}"] = entry["perplexity"]
            metrics[f"kl_to_reference/{name}"] = entry["kl_to_reference"]
        return Outcome(metrics)


@dataclass(frozen=True, slots=True)
class _Work:
    """What every pass needs to know; picklable."""

    config: Evaluate
    data: Artifact
    micro_batch: int | None
    num_threads: int
    device: str
    reporter: Reporter


def _work(config: Evaluate, context: Context) -> _Work:
    resources = context.resources
    device = "cuda" if resources.gpus_per_worker > 0 else "cpu"
    threads = max(1, int(resources.cpus_per_worker))
    return _Work(config, context.one("data"), resources.micro_batch, threads, device, context.reporter)


def _run_passes(passes: "list[Pass]", work: _Work, context: Context) -> "list[Scored]":
    """Run the passes as Ray tasks, `workers` at once, each when those it depends on are done."""
    import ray

    resources = context.resources
    options = {
        "num_cpus": resources.cpus_per_worker,
        "num_gpus": resources.gpus_per_worker,
        "memory": resources.memory_bytes_per_worker,
        "max_retries": 0,
    }
    # A streaming generator's values belong to the caller; what a task `put`s itself is lost when its worker goes idle.
    task = ray.remote(_score).options(**options, num_returns="streaming")
    waiting = list(passes)
    running: dict[Any, tuple[Pass, Any]] = {}
    kept: dict[str, list[Any]] = {}
    done: dict[str, Scored] = {}
    try:
        while waiting or running:
            ready = [one for one in waiting if all(name in kept for name in one.against)]
            for one in ready[: resources.workers - len(running)]:
                waiting.remove(one)
                stream = task.remote(one, work, {name: kept[name] for name in one.against})
                running[stream.completed()] = (one, stream)
            (finished,), _ = ray.wait(list(running), num_returns=1)
            one, stream = running.pop(finished)
            *states, facts = list(stream)
            scored = ray.get(facts)
            name = one.candidate.name
            kept[name], done[name] = states, scored
            context.reporter.progress(len(done), len(passes), "models")
            context.reporter.note(f"{name}: {scored.total('nll') / scored.total('tokens'):.4f} nats per token")
    except BaseException:
        for _, stream in running.values():
            ray.cancel(stream)
        raise
    return [done[one.candidate.name] for one in passes]


def _score(one: "Pass", work: _Work, kept: Mapping[str, list[Any]]) -> Iterator[Any]:
    """Score one model in a worker; yield its output head and states where others need them, then what was found."""
    from itertools import chain

    import torch

    from stages.errors import StageFailed
    from stages.evaluate.checkpoint_facts import count_parameters, read_axes
    from stages.evaluate.rows import read_batches
    from stages.evaluate.scores import Scored
    from stages.evaluate.scoring import DocumentSums, score_batches
    from stages.formats.dataset import DatasetInfo
    from stages.models.checkpoints import load_model
    from stages.models.compatibility import check_compatible
    from stages.models.heads import PackedTensor, observe_head

    work.reporter.started()
    torch.set_num_threads(work.num_threads)
    candidate = one.candidate
    folder = candidate.artifact.folder(candidate.folder)
    dataset = DatasetInfo.read(work.data)
    check_compatible(f"the candidate {candidate.name!r}", folder, dataset)
    model = load_model(folder, dtype=work.config.dtype, device=work.device)
    rows = work.micro_batch or max(1, TOKENS_PER_BATCH // dataset.sequence_length)
    batches = read_batches(_shards(work.config, work.data), _chosen_rows(work.config, work.data), rows_per_batch=rows)
    first = next(batches, None)
    if first is None:
        raise StageFailed(f"the dataset's split {work.config.split!r} has no rows; expected text to score")
    head = observe_head(model, torch.as_tensor(first.input_ids_BT, device=work.device).long(), dataset.vocabulary_size)
    if one.keep:
        if not head.is_replayed:
            work.reporter.note(
                f"{candidate.name}: its output head cannot be replayed, so {dataset.vocabulary_size} logits of every "
                "token are kept to compare others with; Evaluate.max_rows bounds them"
            )
        yield head.pack()
    sums = DocumentSums()
    for states in score_batches(
        model,
        head,
        chain([first], batches),
        references={name: _reference(refs, work) for name, refs in kept.items()},
        sums=sums,
        name=candidate.name,
    ):
        if one.keep:
            yield PackedTensor.of(states)
    if not sums.sums:
        raise StageFailed(
            f"the rows of split {work.config.split!r} hold no targets; expected text that is to be predicted"
        )
    yield Scored(candidate, sums.arrays(), count_parameters(folder), read_axes(folder))


def _reference(refs: list[Any], work: _Work) -> Any:
    """Return a distribution that an earlier task kept; its states are fetched one batch at a time."""
    import ray

    from stages.evaluate.scoring import Reference

    head = ray.get(refs[0]).unpack(work.device)
    return Reference(head, (ray.get(ref).tensor(work.device) for ref in refs[1:]))


def _shards(config: Evaluate, data: Artifact) -> Any:
    from stages.errors import StageFailed

    paths = data.paths(f"tokens/{config.split}-*.parquet")
    if not paths:
        raise StageFailed(f"the dataset has no split {config.split!r}; expected files tokens/{config.split}-*.parquet")
    return paths


def _chosen_rows(config: Evaluate, data: Artifact) -> Any:
    from stages.evaluate.rows import choose_rows, count_rows

    return choose_rows(count_rows(_shards(config, data)), max_rows=config.max_rows, seed=config.seed)


def _to_parquet(pq: Any, table: Any) -> bytes:
    import io

    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()
