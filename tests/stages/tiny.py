"""Tiny inputs in the shared formats, made on the spot from a seed: a tokenizer, a dataset of random rows, a model."""

from pathlib import Path
from typing import Any

import numpy as np

from stages.contract import Artifact, Split
from stages.formats.dataset import DatasetInfo, RejectedRows, SplitCounts
from stages.formats.tokens import TokenRows, shard_name, to_parquet
from stages.storage import Folder
from tests.fakes import artifact_of


def write_tokenizer(folder: Path, vocabulary: int) -> str:
    """Write a word-level tokenizer; return its digest."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from stages.models.tokenization import tokenizer_digest

    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocabulary)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w1", unk_token="w0")
    wrapped.save_pretrained(folder)
    return tokenizer_digest(wrapped)


def dataset_info(**changes: Any) -> DatasetInfo:
    """Return a `dataset.json`, with some fields changed."""
    fields = {
        "tokenizer_digest": "0" * 64, "vocabulary_size": 96, "sequence_length": 16, "bos_token_id": None,
        "eos_token_id": 1, "pad_token_id": 1, "splits": {}, "sources": ({},), "unlearned_answers": 0,
        "rejected": RejectedRows(count=0, rows_read=0, examples=()),
    }  # fmt: skip
    return DatasetInfo(**{**fields, **changes})


def write_dataset(
    folder: Path,
    *,
    vocabulary: int = 96,
    length: int = 16,
    shards: tuple[int, ...] = (5, 7, 6),
    num_calibration: int = 0,
    segments: int = 1,
    seed: int = 0,
) -> Artifact:
    """Write a dataset artifact of random rows of equal segments, some padded at the end; return it.

    The last `num_calibration` shards are of the calibration split, the others of that to train on.
    """
    rng = np.random.default_rng(seed)
    digest = write_tokenizer(folder / "tokenizer", vocabulary)
    (folder / "tokens").mkdir()
    targets = 0
    for part, rows in enumerate(shards):
        input_ids = rng.integers(2, vocabulary, (rows, length), dtype=np.int32)
        # A learnable structure: every other token follows from the one before.
        input_ids[:, 1::2] = (input_ids[:, 0::2][:, : input_ids[:, 1::2].shape[1]] * 7 + 3) % (vocabulary - 2) + 2
        mask = np.ones((rows, length), bool)
        positions = np.tile(np.arange(length, dtype=np.int32) % (length // segments), (rows, 1))
        mask &= positions > 0
        padded = rng.integers(0, max(1, length // 3), rows)
        for row, count in enumerate(padded):
            if count:
                input_ids[row, -count:], mask[row, -count:] = 1, False
        targets += int(mask.sum())
        owners = np.where(mask, part, -1).astype(np.int64)
        shard = to_parquet(TokenRows(input_ids, owners, mask, positions))
        split: Split = "train" if part < len(shards) - num_calibration else "calibration"
        (folder / shard_name(split, part)).write_bytes(shard)
    counts = SplitCounts(shards=len(shards), rows=sum(shards), tokens=targets, documents=len(shards))
    info = dataset_info(
        tokenizer_digest=digest, vocabulary_size=vocabulary, sequence_length=length, splits={"train": counts}
    )
    info.write(Folder.at(folder))
    return artifact_of("dataset", folder)


def tiny_llama(*, vocabulary: int = 96, width: int = 32, layers: int = 2, seed: int = 0, **options: Any) -> Any:
    """Return a small Llama with random weights, loud enough that its distribution is not flat."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(seed)
    settings = {
        "vocab_size": vocabulary, "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 2 * width, "max_position_embeddings": 64,
        "initializer_range": 0.3, "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": 1,
    }  # fmt: skip
    return AutoModelForCausalLM.from_config(LlamaConfig(**{**settings, **options})).eval()


def write_model(folder: Path, model: Any, tokenizer: Path | None = None) -> Artifact:
    """Save a model (and a tokenizer's files) as a model artifact; return it."""
    model.save_pretrained(folder / "model")
    for path in tokenizer.iterdir() if tokenizer else ():
        (folder / "model" / path.name).write_bytes(path.read_bytes())
    return artifact_of("model", folder)


def artifact_of_context(kind: Any, context: Any) -> Artifact:
    """Return the artifact that an engine would commit from a context: its files and those with receipts."""
    from stages.contract import read_receipts

    plain = artifact_of(kind, Path(context.out.uri))
    receipted = {file.name: file for file in read_receipts(context.resume)}
    others = tuple(file for file in plain.files if file.name not in receipted)
    return Artifact(kind, plain.fingerprint, (*others, *receipted.values()))
