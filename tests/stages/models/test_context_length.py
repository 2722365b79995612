"""The context that a config.json names, whatever its architecture calls it."""

from typing import Any

import pytest
from transformers import GPT2Config, LlamaConfig, MambaConfig, MptConfig, OPTConfig

from stages.models.context_length import longest_context


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LlamaConfig(max_position_embeddings=4096), 4096),
        (GPT2Config(n_positions=256), 256),
        (OPTConfig(max_position_embeddings=512), 512),
        (MptConfig(max_seq_len=1024), 1024),
        (MambaConfig(), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_context_of_a_family_is_what_its_config_says(config: Any, expected: int | None) -> None:
    assert longest_context(config.to_dict()) == expected


def test_context_of_a_model_of_several_inputs_is_its_text_parts() -> None:
    nested = {"max_position_embeddings": 77, "text_config": {"max_position_embeddings": 8192}, "vision_config": {}}
    assert longest_context(nested) == 8192


@pytest.mark.parametrize("config", [{}, {"max_position_embeddings": None}, {"max_position_embeddings": -1}])
def test_config_without_a_limit_has_none(config: dict[str, Any]) -> None:
    assert longest_context(config) is None
