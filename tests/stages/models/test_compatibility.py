"""Which checkpoints fit a dataset, whatever family they are of."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3TextConfig, GPT2Config

from stages.errors import StageFailed
from stages.formats.dataset import DatasetInfo
from stages.models.compatibility import check_compatible
from tests.stages.tiny import dataset_info, tiny_llama, write_dataset, write_model


def gpt2() -> Any:
    return AutoModelForCausalLM.from_config(GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=4, n_positions=64))


def gemma3() -> Any:
    """A model of images and text: what is about text is a config in its config."""
    text = Gemma3TextConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=64, max_position_embeddings=64,
    )  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(Gemma3Config(text_config=text.to_dict(), vision_config=vision))


@pytest.mark.parametrize("build", [tiny_llama, gpt2, gemma3])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"vocabulary_size": 97}, "the vocabulary of the teacher has 96 entries, expected at least the dataset's 97"),
        (
            {"sequence_length": 65},
            "the context of the teacher is 64 tokens, expected at least the 65 of the dataset's rows",
        ),
        ({"tokenizer_digest": "0" * 64}, "the teacher has another tokenizer .* than the dataset"),
    ],
    ids=["fits", "vocabulary", "context", "tokenizer"],
)
def test_checkpoint_fits_or_is_refused_with_what_does_not(
    tmp_path: Path, build: Any, change: dict[str, Any], message: str | None
) -> None:
    data = write_dataset(tmp_path / "data")
    folder = write_model(tmp_path / "model", build(), tmp_path / "data" / "tokenizer").folder("model")
    facts = DatasetInfo.read(data).model_copy(update=change)
    if message is None:
        check_compatible("the teacher", folder, facts)
    else:
        with pytest.raises(StageFailed, match=message):
            check_compatible("the teacher", folder, facts)


def test_checkpoint_without_a_tokenizer_is_taken_at_its_word(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data")
    folder = write_model(tmp_path / "model", tiny_llama()).folder("model")
    check_compatible("the teacher", folder, DatasetInfo.read(data))


def test_checkpoint_of_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "alembic"}')
    with pytest.raises(StageFailed, match=r"cannot read the config in .*alembic"):
        check_compatible("the teacher", tmp_path, dataset_info())
