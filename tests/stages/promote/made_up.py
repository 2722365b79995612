"""Scores made up in numbers: what Evaluate would write for models of given quality, without any model."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stages.contract import Artifact
from stages.formats.documents import ModelDocuments, write_documents
from stages.formats.scores import CandidateScores, ReferenceScores, Scores
from stages.formats.speed import CandidateSpeed, Speed
from stages.storage import Folder
from tests.fakes import artifact_of

NUM_DOCUMENTS = 120


@dataclass(frozen=True)
class Made:
    """A model of given quality."""

    excess: float
    """Its cross-entropy over the teacher's, nats per token."""
    kl: float = 0.3
    size_bytes: int = 4_000_000
    base: str | None = None
    kind: str = "quantized"
    """How it was made, where it has a base."""
    kl_to_base: float = 0.01
    agreement_with_base: float = 0.97
    noise: float = 0.05
    """Standard deviation of its excess over documents."""


TEACHER = Made(excess=0.0, kl=0.0, size_bytes=13_100_000, noise=0.0)


def reference_scores(perplexity: float, kl: float | None = None) -> ReferenceScores:
    entropy = float(np.log(perplexity))
    figures = {"cross_entropy": entropy, "perplexity": perplexity, "bits_per_byte": entropy / 2}
    return ReferenceScores(text="made up", **figures, kl_to_reference=kl, agreement=None if kl is None else 1 - kl)


def write_scores(
    folder: Path,
    models: dict[str, Made],
    *,
    reference: str | None = "teacher",
    seed: int = 0,
    num_documents: int = NUM_DOCUMENTS,
    **references: ReferenceScores,
) -> Artifact:
    """Write `scores.json` and `documents.parquet`; a model with a base was derived from it."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(40, 400, num_documents)
    difficulty = rng.gamma(9.0, 0.25, num_documents)
    everything = models if reference else {**models, "@reference": TEACHER}
    entries, documents = {}, {}
    for name, made in everything.items():
        jitter = rng.normal(0, 1, (3, num_documents))
        nll = tokens * (difficulty + made.excess + made.noise * jitter[0])
        kl = tokens * made.kl * np.exp(0.2 * jitter[1])
        agree = np.minimum(tokens, np.round(tokens * (1 - min(0.9, made.kl)))).astype(int)
        kl_base = tokens * made.kl_to_base * np.exp(0.2 * jitter[2]) if made.base else None
        agree_base = np.round(tokens * made.agreement_with_base).astype(int) if made.base else None
        order = rng.permutation(num_documents)
        columns = (np.arange(num_documents) * 7919, tokens, nll, kl, agree, kl_base, agree_base)
        documents[name] = ModelDocuments(*(None if column is None else column[order] for column in columns))
        total = tokens.sum()
        if name in models:
            entries[name] = CandidateScores(
                fingerprint=fingerprint_of(name),
                folder=f"finalists/{name}" if made.base else "model",
                uri_prefix=f"s3://bucket/{name}",
                kind=made.kind if made.base else "model",
                base=made.base if made.base in everything else None,
                base_fingerprint=fingerprint_of(made.base) if made.base else None,
                method=name.rpartition(".")[2] if made.base else None,
                axes={"layers": "4", **({"bits": "4"} if made.base else {})},
                parameters=3_000_000,
                size_bytes=made.size_bytes,
                bits_per_weight=8 * made.size_bytes / 3_000_000,
                compression_x=TEACHER.size_bytes / made.size_bytes,
                cross_entropy=nll.sum() / total,
                bits_per_byte=nll.sum() / total / 2,
                perplexity=float(np.exp(nll.sum() / total)),
                kl_to_reference=kl.sum() / total,
                agreement=agree.sum() / total,
                kl_to_base=None if kl_base is None else kl_base.sum() / total,
                agreement_with_base=None if agree_base is None else agree_base.sum() / total,
            )
    out = Folder.at(folder)
    write_documents(out, documents)
    Scores(
        split="validation",
        dtype="float32",
        tokens=int(tokens.sum()),
        text_bytes=int(tokens.sum()) * 3,
        documents=num_documents,
        rows=64,
        dataset_fingerprint=fingerprint_of("data"),
        reference=reference,
        reference_fingerprint=fingerprint_of("teacher"),
        reference_bytes=TEACHER.size_bytes,
        reference_bytes_16bit=TEACHER.size_bytes,
        **references,
        models=entries,
    ).write(out)
    return artifact_of("scores", folder)


def fingerprint_of(name: str) -> str:
    return f"{name:->64}"


def write_speed(folder: Path, models: dict[str, Made]) -> Artifact:
    """Write `speed.json`: 2 ms a token for each model, nothing for those that were derived from another."""
    absent = CandidateSpeed(reason="no kernel here")
    figures = {name: 2.0 for name in CandidateSpeed.model_fields if name not in ("peak_memory_bytes", "reason")}
    measured = CandidateSpeed(**figures, peak_memory_bytes=9_000_000)
    load = {"batch_size": 1, "prompt_tokens": 8, "new_tokens": 4, "repeats": 3}
    entries = {name: absent if made.base else measured for name, made in models.items()}
    Speed(device="a CPU", threads=1, dtype="float32", **load, models=entries).write(Folder.at(folder))
    return artifact_of("speed", folder)
