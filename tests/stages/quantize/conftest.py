"""A tiny model and a tiny dataset, as artifacts in the common formats."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stages.contract import Artifact
from stages.formats.tokens import TokenRows, to_parquet
from stages.models.tokenization import load_tokenizer, tokenizer_digest
from stages.storage import Folder
from tests.fakes import artifact_of
from tests.stages.tiny import dataset_info

VOCABULARY = 256
WIDTH = 64
SEQUENCE = 32


def write_shard(path: Path, ids: np.ndarray, masks: np.ndarray, first_document: int = 0) -> None:
    """Write rows that are a document each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    owners = np.repeat(first_document + np.arange(len(ids), dtype=np.int64), ids.shape[1]).reshape(ids.shape)
    path.write_bytes(to_parquet(TokenRows(ids, owners, masks)))


def calibration_rows(num: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    ids = np.random.default_rng(seed).integers(0, VOCABULARY, (num, SEQUENCE), dtype=np.int32)
    masks = np.ones_like(ids, dtype=bool)
    masks[:, 0] = False
    return ids, masks


@pytest.fixture(scope="package")
def data(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("data")
    ids, masks = calibration_rows(40)
    write_shard(folder / "tokens/calibration-00000.parquet", ids[:24], masks[:24])
    write_shard(folder / "tokens/calibration-00001.parquet", ids[24:], masks[24:], 24)
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    digest = tokenizer_digest(load_tokenizer(folder / "tokenizer"))
    info = dataset_info(vocabulary_size=VOCABULARY, sequence_length=SEQUENCE, tokenizer_digest=digest)
    info.write(Folder.at(folder))
    return artifact_of("dataset", folder)


def tiny_tokenizer() -> Any:
    """One word for each id."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<eos>": 0} | {f"w{i}": i for i in range(1, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def save_tiny_model(folder: Path, **changes: object) -> None:
    """A Llama of width 64 whose logits are not flat, so that quantizing it changes what it says."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": SEQUENCE,
        "tie_word_embeddings": True,
        "initializer_range": 0.15,
    }
    LlamaForCausalLM(LlamaConfig(**config | changes)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


@pytest.fixture(scope="package")
def model(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("model")
    save_tiny_model(folder / "model")
    return artifact_of("model", folder)
