"""Whether a checkpoint can read a dataset's tokens: asked of teachers, students and whatever is scored.

Promise: what would fail, or silently give figures about something else, after hours of work is refused before it.
"""

from pathlib import Path

from stages.errors import StageFailed
from stages.formats.dataset import DatasetInfo
from stages.models.checkpoints import text_config
from stages.models.tokenization import has_tokenizer, load_tokenizer, tokenizer_digest

__all__ = ["check_compatible"]


def check_compatible(what: str, folder: Path, dataset: DatasetInfo) -> None:
    """Refuse a checkpoint that does not fit a dataset.

    Args:
        what: the checkpoint's name in errors, e.g. `the teacher`.
        folder: the checkpoint.
        dataset: what it shall read.

    Raises:
        StageFailed: its vocabulary is smaller, its context is shorter, or its tokenizer gives other ids.
    """
    config = text_config(folder)
    if config.vocab_size < dataset.vocabulary_size:
        raise StageFailed(
            f"the vocabulary of {what} has {config.vocab_size} entries, expected at least the dataset's "
            f"{dataset.vocabulary_size}; prepare the dataset with the tokenizer of this model"
        )
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and context < dataset.sequence_length:
        raise StageFailed(
            f"the context of {what} is {context} tokens, expected at least the {dataset.sequence_length} of the "
            f"dataset's rows; prepare the dataset with sequence_length={context} or less"
        )
    if not has_tokenizer(folder):
        return
    found, expected = tokenizer_digest(load_tokenizer(folder)), dataset.tokenizer_digest
    if found != expected:
        raise StageFailed(
            f"{what} has another tokenizer (digest {found[:12]}) than the dataset ({expected[:12]}), and the same text "
            "has other ids in each; prepare the dataset with the tokenizer of this model"
        )
