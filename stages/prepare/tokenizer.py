"""The dataset's tokenizer: trained here on the training split, or one from outside, and what workers need of it.

Promise: the same texts in the same order give the same tokenizer; a tokenizer from outside is copied file by file, so
that its digest stays what it was.
Does not: change a tokenizer from outside (no token is added, no chat template set).
"""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.checkpoints import load_tokenizer, tokenizer_digest, vocabulary_size
from stages.errors import StageFailed
from stages.outside import TOKENIZER_FILES
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
            f"the training split is too small for vocabulary_size={vocabulary_size}: it has words for "
            f"{tokenizer.get_vocab_size()} tokens; lower vocabulary_size to that, or give more text"
        )
    wrapped: PreTrainedTokenizerBase = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False
    )
    return wrapped


def copy_tokenizer(source: Path, folder: Path) -> "PreTrainedTokenizerBase":
    """Copy a tokenizer's files, and load it; one in an older layout is saved anew instead.

    Raises:
        StageFailed: the folder holds no tokenizer that transformers can load.
    """
    if (source / "tokenizer.json").exists() and _names_its_class(source / "tokenizer_config.json"):
        for name in sorted(TOKENIZER_FILES):
            if (source / name).exists():
                shutil.copyfile(source / name, folder / name)
    else:
        load_tokenizer(source).save_pretrained(folder)
    return load_tokenizer(folder)


def _names_its_class(path: Path) -> bool:
    """Tell whether a tokenizer's config can do without the model's config beside it."""
    return path.exists() and bool(json.loads(path.read_text()).get("tokenizer_class"))


def describe_tokenizer(tokenizer: "PreTrainedTokenizerBase", folder: Path) -> tuple[EncoderState, dict[str, Any]]:
    """Return what workers need of a tokenizer that lies in a folder, and its facts for `dataset.json`.

    Raises:
        StageFailed: it has no end-of-text token, or no fast implementation.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise StageFailed(
            f"the tokenizer in {folder} is a slow {type(tokenizer).__name__}; expected a fast one, with tokenizer.json"
        )
    if tokenizer.eos_token_id is None:
        raise StageFailed(
            f"the tokenizer in {folder} has no eos_token to end each document with; set it in tokenizer_config.json"
        )
    digest = tokenizer_digest(folder)
    first = backend.encode("a", add_special_tokens=True).ids[0]
    special = {name: str(text) for name, text in tokenizer.special_tokens_map.items() if not isinstance(text, list)}
    state = EncoderState(
        digest=digest,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=first if first == tokenizer.bos_token_id else None,
        backend=backend.to_str(),
        chat_template=_chat_template(tokenizer),
        special_tokens=tuple(sorted(special.items())),
    )
    facts = {
        "tokenizer_digest": digest,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "vocabulary_size": vocabulary_size(folder),
    }
    return state, facts


def _chat_template(tokenizer: "PreTrainedTokenizerBase") -> str:
    template = tokenizer.chat_template
    return (template.get("default") if isinstance(template, dict) else template) or DEFAULT_TEMPLATE
