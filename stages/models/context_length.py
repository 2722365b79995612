"""How many tokens a checkpoint can read at once, by its config.json: asked while a run is planned, so without torch."""

from collections.abc import Mapping
from typing import Any

__all__ = ["longest_context"]

FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "n_ctx")
"""Names that architectures give it: most; GPT-2 and GPT-J; MPT and DBRX; some of the hub's own; the first GPT."""
TEXT_PARTS = ("text_config", "llm_config", "language_config", "decoder")
"""Where a model of several kinds of input describes the part that is about text."""


def longest_context(config: Mapping[str, Any]) -> int | None:
    """Return the tokens that a checkpoint can read at most; None where its config sets no limit (Mamba, BLOOM).

    Args:
        config: the checkpoint's config.json.
    """
    parts = [config, *(config[name] for name in TEXT_PARTS if isinstance(config.get(name), Mapping))]
    found = [part[name] for part in reversed(parts) for name in FIELDS if isinstance(part.get(name), int)]
    return next((length for length in found if length > 0), None)
