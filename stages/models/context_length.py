"""How many tokens a checkpoint can read at once, by its config.json: asked while a run is planned, so without torch."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from stages.errors import ConfigError, ExternalDataError
from stages.external.checkpoints import Checkpoint

__all__ = ["choose_row_length", "longest_context", "text_part"]

FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "n_ctx")
"""Names that architectures give it: most; GPT-2 and GPT-J; MPT and DBRX; some of the hub's own; the first GPT."""
TEXT_PARTS = ("text_config", "llm_config", "language_config", "thinker_config", "decoder")
"""Where a model of several kinds of input describes the part that is about text."""


def text_part(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a config.json that is about text, as it is written: without a family's own defaults."""
    nested = next((config[name] for name in TEXT_PARTS if isinstance(config.get(name), Mapping)), None)
    return dict(config) if nested is None else text_part(nested)


def longest_context(config: Mapping[str, Any]) -> int | None:
    """Return the tokens that a checkpoint can read at most; None where its config sets no limit (Mamba, BLOOM).

    Args:
        config: the checkpoint's config.json.
    """
    parts = (text_part(config), config)
    found = [part[name] for part in parts for name in FIELDS if isinstance(part.get(name), int)]
    return next((length for length in found if length > 0), None)


LONGEST_ROW = 2048
"""Tokens of a row where none are asked for: what papers calibrate and evaluate on, at bearable memory."""


def choose_row_length(given: int | None, checkpoints: Mapping[str, Checkpoint]) -> int:
    """Return the tokens of a row: those that are given, or what all checkpoints can read.

    Args:
        given: what is asked for, if anything.
        checkpoints: what reads the rows, by its name in errors.

    Raises:
        ConfigError: more are given than a checkpoint can read.
    """
    lengths = [LONGEST_ROW if given is None else given]
    for what, checkpoint in checkpoints.items():
        with suppress(ExternalDataError):  # raised where its identity is asked for
            context = longest_context(checkpoint.config(ask_hub=True) or {})
            if given is not None and context is not None and context < given:
                raise ConfigError(
                    f"sequence_length is {given}, and {what} ({checkpoint.source}) reads at most {context} tokens; set "
                    f"it to {context} or less, or leave it out"
                )
            lengths += [] if context is None else [context]
    return min(lengths)
