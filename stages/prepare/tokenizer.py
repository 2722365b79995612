"""The dataset's tokenizer: trained here on the training split, and what workers need of this or any other.

Promise: the same texts in the same order give the same tokenizer.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.errors import StageFailed
from stages.models.checkpoints import text_config
from stages.models.tokenization import backend_of, tokenizer_digest, vocabulary_size
from stages.prepare.encoding import DEFAULT_TEMPLATE, EncoderState

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END_OF_TEXT = "<|endoftext|>"


def train_byte_level_bpe(texts: Iterable[str], *, vocabulary_size: int) -> "PreTrainedTokenizerBase":
    """Train a byte-level BPE tokenizer (as GPT-2's).

    Every text can be encoded: the 256 bytes are tokens. Its one special token ends a text; it has no other.

    Raises:
        StageFailed: the text has too few different words for so large a vocabulary.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() < vocabulary_size:
        raise StageFailed(
            f"the training split is too small for vocabulary_size={vocabulary_size}: it yields "
            f"{tokenizer.get_vocab_size()} different tokens; lower vocabulary_size to that, or give more text"
        )
    wrapped: PreTrainedTokenizerBase = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False
    )
    return wrapped


@dataclass(frozen=True, slots=True)
class TokenizerFacts:
    """What `dataset.json` says of a tokenizer."""

    digest: str
    vocabulary_size: int
    bos_token_id: int | None
    eos_token_id: int
    pad_token_id: int | None


def describe_tokenizer(tokenizer: "PreTrainedTokenizerBase", folder: Path) -> tuple[EncoderState, TokenizerFacts]:
    """Return what workers need of a tokenizer that lies in a folder, and what `dataset.json` says of it.

    Raises:
        StageFailed: it has no end-of-text token, or no fast implementation.
    """
    backend = backend_of(tokenizer)
    if tokenizer.eos_token_id is None:
        raise StageFailed(
            f"the tokenizer in {folder} has no eos_token to end each document with; set it in tokenizer_config.json"
        )
    digest, size = tokenizer_digest(tokenizer), vocabulary_size(tokenizer)
    if (folder / "config.json").exists():  # a model may have no embedding for a tokenizer's last tokens (images, audio)
        size = min(size, text_config(folder).vocab_size)
    special = {name: str(text) for name, text in tokenizer.special_tokens_map.items() if not isinstance(text, list)}
    state = EncoderState(
        digest=digest,
        vocabulary_size=size,
        eos_token_id=tokenizer.eos_token_id,
        prefix=_prefix(backend),
        backend=backend.to_str(),
        chat_template=_chat_template(tokenizer),
        special_tokens=tuple(sorted(special.items())),
    )
    facts = TokenizerFacts(
        digest=digest,
        vocabulary_size=size,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return state, facts


def _prefix(backend: Any) -> tuple[int, ...]:
    """Return what a tokenizer puts before a text."""
    bare, whole = (backend.encode("a", add_special_tokens=added).ids for added in (False, True))
    starts = (i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    return tuple(whole[: next(starts, 0)])


def _chat_template(tokenizer: "PreTrainedTokenizerBase") -> str:
    template = tokenizer.chat_template
    return (template.get("default") if isinstance(template, dict) else template) or DEFAULT_TEMPLATE
