"""Signals for a tiny dataset, as `Teach` would leave them, made of a model's dense logits."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from stages.contract import Artifact
from stages.teach.capture import capture
from stages.teach.shards import SCHEMA, record
from tests.fakes import artifact_of


def write_signals(
    folder: Path, data: Artifact, model: Any, *, k: int = 8, temperatures: tuple[float, ...] = (1.0, 2.0)
) -> Artifact:
    """Write a signals artifact; rows are stored backwards, since they are joined by digest."""
    (folder / "signals").mkdir(parents=True)
    facts = data.read_json("dataset.json")
    for path in data.paths("tokens/train-*.parquet"):
        table = pq.read_table(path).to_pydict()
        digests, ids = table["digest"][::-1], torch.tensor(table["input_ids"][::-1])
        with torch.no_grad():
            logits = model(input_ids=ids).logits.flatten(0, 1)[:, : facts["vocabulary_size"]]
        pq.write_table(
            pa.Table.from_batches([record(digests, capture(logits, k, temperatures))], SCHEMA),
            folder / "signals" / path.name,
        )
    summary = {"k": k, "temperatures": list(temperatures)}
    summary.update({name: facts[name] for name in ("vocabulary_size", "sequence_length", "tokenizer_digest")})
    (folder / "signals.json").write_text(json.dumps(summary))
    return artifact_of("signals", folder)
