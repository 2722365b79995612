"""Signals for a tiny dataset, as `Teach` would leave them, made of a model's dense logits."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from stages.contract import Artifact
from stages.formats import signal_shards, tokens
from stages.formats.dataset import DatasetInfo
from stages.formats.signals import SignalsInfo
from stages.storage import Folder
from stages.teach.capture import capture
from stages.teach.shards import record_of
from tests.fakes import artifact_of


def write_signals(
    folder: Path, data: Artifact, model: Any, *, k: int = 8, temperatures: tuple[float, ...] = (1.0, 2.0)
) -> Artifact:
    """Write a signals artifact; rows are stored backwards, since they are joined by digest."""
    (folder / "signals").mkdir(parents=True)
    dataset = DatasetInfo.read(data)
    for path in data.paths(tokens.shard_pattern("train")):
        rows = tokens.read_rows([path], ("digest",))
        rows = rows.take(np.arange(len(rows))[::-1])
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(rows.ids_RT).long()).logits.flatten(0, 1)
        found = capture(logits[:, : dataset.vocabulary_size], k, temperatures)
        with (folder / "signals" / path.name).open("wb") as sink, signal_shards.writer(sink) as write:
            write(record_of(rows.digests, found))
    SignalsInfo(
        method="topk", k=k, temperatures=temperatures, vocabulary_size=dataset.vocabulary_size,
        teacher_fingerprint="t", dataset_fingerprint=data.fingerprint, tokenizer_digest=dataset.tokenizer_digest,
        sequence_length=dataset.sequence_length, split="train", dtype="float32", rows=1, tokens=1, bytes_per_token=1.0,
    ).write(Folder.at(folder))  # fmt: skip
    return artifact_of("signals", folder)
