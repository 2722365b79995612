"""Tiny artifacts on disk: a dataset of packed rows, models with a padded head, a search with finalists."""

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from stages.contract import Artifact
from stages.formats.search import Finalist, Search
from stages.formats.tokens import TokenRows, shard_name, to_parquet
from stages.models.tokenization import load_tokenizer, tokenizer_digest
from stages.storage import Folder
from tests.fakes import artifact_of
from tests.stages.tiny import dataset_info

VOCABULARY = 50
"""Words of the tokenizer; the models' heads have 64."""
LENGTH = 16
"""Tokens of a row."""


def save_tokenizer(folder: Path, num_words: int = VOCABULARY) -> None:
    words = {f"w{i}": i for i in range(num_words)}
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w0", eos_token="w1").save_pretrained(folder)


def make_dataset(folder: Path, *, rows: tuple[int, ...] = (5, 4), seed: int = 0) -> Artifact:
    """A validation split in `rows` shards; documents of about 20 tokens whose windows are segments, the last row half padding."""
    rng = np.random.default_rng(seed)
    save_tokenizer(folder / "tokenizer")
    total = sum(rows)
    document_ids = np.cumsum(rng.random(total * LENGTH) < 0.05).reshape(total, LENGTH) * 1_000_003
    input_ids = rng.integers(2, VOCABULARY, (total, LENGTH), dtype=np.int32)
    loss_mask = rng.random((total, LENGTH)) < 0.9
    starts = np.diff(document_ids, axis=1, prepend=-1) != 0
    loss_mask &= ~starts
    loss_mask[-1, LENGTH // 2 :] = False
    document_ids[-1, LENGTH // 2 :] = -1
    starts[-1, LENGTH // 2] = True
    places = np.broadcast_to(np.arange(LENGTH), starts.shape)
    positions = (places - np.maximum.accumulate(np.where(starts, places, 0), axis=1)).astype(np.int32)
    (folder / "tokens").mkdir()
    start = 0
    for part, count in enumerate(rows):
        cut = slice(start, start + count)
        shard = to_parquet(TokenRows(input_ids[cut], document_ids[cut], loss_mask[cut], positions[cut]))
        (folder / shard_name("validation", part)).write_bytes(shard)
        start += count
    digest = tokenizer_digest(load_tokenizer(folder / "tokenizer"))
    info = dataset_info(tokenizer_digest=digest, vocabulary_size=VOCABULARY, sequence_length=LENGTH)
    info.write(Folder.at(folder))
    return artifact_of("dataset", folder)


def save_model(folder: Path, *, seed: int, layers: int = 2, width: int = 32, vocab_size: int = 64) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=128,
        initializer_range=0.5,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return model


def make_model(folder: Path, *, seed: int, **shape: int) -> Artifact:
    save_model(folder / "model", seed=seed, **shape)
    return artifact_of("model", folder)


def make_search(folder: Path, base: Artifact, schemes: tuple[str, ...]) -> Artifact:
    """A search of `base` whose finalists lie in `finalists/<scheme>`, saved there before."""
    figures = {"kl": 0.0, "reloaded_kl": 0.0, "agreement": 1.0, "size_bytes": 1}
    bits = {"bits_per_weight": 8.0, "linear_bits_per_weight": 8.0}
    Search(
        base=base.fingerprint,
        base_bytes=1,
        max_kl=0.1,
        trials=(),
        finalists=tuple(Finalist(scheme=each, folder=f"finalists/{each}", **figures, **bits) for each in schemes),
        chosen=None,
    ).write(Folder.at(folder))
    return artifact_of("search", folder)


def quantize(model: Path, folder: Path) -> None:
    """Save a compressed-tensors checkpoint of a model: 8-bit integers, a scale for each channel, rounded to nearest."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    loaded = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    oneshot(model=loaded, recipe=QuantizationModifier(config_groups=groups, ignore=["lm_head"]))
    loaded.save_pretrained(folder, save_compressed=True)
    save_tokenizer(folder)
