"""Scores made up in numbers: what Evaluate would write for models of given quality, without any model."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stages.contract import Artifact
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
    kl_to_base: float = 0.01
    agreement_with_base: float = 0.97
    noise: float = 0.05
    """Standard deviation of its excess over documents."""


TEACHER = Made(excess=0.0, kl=0.0, size_bytes=13_100_000, noise=0.0)


def write_scores(
    folder: Path, models: dict[str, Made], *, reference: str | None = "teacher", seed: int = 0
) -> Artifact:
    """Write `scores.json` and `documents.parquet`; a model with a base is quantized."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(40, 400, NUM_DOCUMENTS)
    difficulty = rng.gamma(9.0, 0.25, NUM_DOCUMENTS)
    everything = models if reference else {**models, "@reference": TEACHER}
    entries, tables = {}, []
    for name, made in everything.items():
        jitter = rng.normal(0, 1, (3, NUM_DOCUMENTS))
        nll = tokens * (difficulty + made.excess + made.noise * jitter[0])
        kl = tokens * made.kl * np.exp(0.2 * jitter[1])
        agree = np.minimum(tokens, np.round(tokens * (1 - min(0.9, made.kl)))).astype(int)
        kl_base = tokens * made.kl_to_base * np.exp(0.2 * jitter[2]) if made.base else [None] * NUM_DOCUMENTS
        agree_base = np.round(tokens * made.agreement_with_base).astype(int) if made.base else [None] * NUM_DOCUMENTS
        table = pa.table(
            {
                "model": [name] * NUM_DOCUMENTS,
                "document_id": np.arange(NUM_DOCUMENTS) * 7919,
                "tokens": tokens,
                "nll": nll,
                "kl": kl,
                "agree": agree,
                "kl_to_base": pa.array(kl_base, pa.float64()),
                "agree_with_base": pa.array(agree_base, pa.int64()),
            }
        )
        tables.append(table.take(rng.permutation(NUM_DOCUMENTS)))
        total = tokens.sum()
        if name in models:
            entries[name] = {
                "fingerprint": f"{name:->64}",
                "folder": f"finalists/{name}" if made.base else "model",
                "uri_prefix": f"s3://bucket/{name}",
                "kind": "quantized" if made.base else "model",
                "base": made.base,
                "scheme": name.rpartition(".")[2] if made.base else None,
                "axes": {"layers": "4", **({"bits": "4"} if made.base else {})},
                "parameters": 3_000_000,
                "size_bytes": made.size_bytes,
                "bits_per_weight": 8 * made.size_bytes / 3_000_000,
                "compression_x": TEACHER.size_bytes / made.size_bytes,
                "cross_entropy": nll.sum() / total,
                "perplexity": float(np.exp(nll.sum() / total)),
                "kl_to_reference": kl.sum() / total,
                "agreement": agree.sum() / total,
                "kl_to_base": kl_base.sum() / total if made.base else None,
                "agreement_with_base": agree_base.sum() / total if made.base else None,
            }
    scores = {
        "split": "validation",
        "tokens": int(tokens.sum()),
        "documents": NUM_DOCUMENTS,
        "rows": 64,
        "reference": reference,
        "reference_bytes": TEACHER.size_bytes,
        "models": entries,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scores.json").write_text(json.dumps(scores))
    pq.write_table(pa.concat_tables(tables), folder / "documents.parquet")
    return artifact_of("scores", folder)


def write_speed(folder: Path, models: dict[str, Made]) -> Artifact:
    """Write `speed.json`: 2 ms a token for each model, nothing for quantized ones."""
    figures = ("prefill_p50_ms", "prefill_p95_ms", "latency_p50_ms", "latency_p95_ms", "tokens_per_second")
    entries = {
        name: {**dict.fromkeys(figures), "peak_memory_bytes": None, "reason": "no kernel here"}
        if made.base
        else {**dict.fromkeys(figures, 2.0), "peak_memory_bytes": 9_000_000, "reason": None}
        for name, made in models.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "speed.json").write_text(json.dumps({"device": "a CPU", "models": entries}))
    return artifact_of("speed", folder)
