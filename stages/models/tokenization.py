"""Tokenizers on disk: load, copy, compare, count.

Promises: a tokenizer travels file by file and is never saved anew where it can be helped, since transformers rebuilds
one when it saves it; what is compared is what transformers makes of the files, which is what gives a text its ids.
Does not: change a tokenizer (no token is added, no chat template set).
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.errors import StageFailed
from stages.external.checkpoints import TOKENIZER_FILES
from stages.runtime.processes import quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "backend_of",
    "copy_tokenizer",
    "copy_tokenizer_files",
    "has_tokenizer",
    "load_tokenizer",
    "tokenizer_digest",
    "vocabulary_size",
]


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """Load a tokenizer.

    Raises:
        StageFailed: the folder holds none, or one that needs code from outside.
    """
    from transformers import AutoTokenizer

    quiet_transformers()
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError) as error:
        raise StageFailed(f"cannot load the tokenizer in {folder}: {type(error).__name__}: {error}") from error
    return tokenizer


def has_tokenizer(folder: Path) -> bool:
    """Return whether a checkpoint brings a tokenizer."""
    return any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json"))


def copy_tokenizer_files(source: Path, folder: Path) -> None:
    """Copy a tokenizer's files as they are."""
    for name in sorted(TOKENIZER_FILES):
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)


def copy_tokenizer(source: Path, folder: Path) -> "PreTrainedTokenizerBase":
    """Copy a tokenizer's files so that they can do without the model beside them, and load it.

    The model's config, where there is one, is copied too: transformers chooses a tokenizer's class by both. Only a
    tokenizer in an older layout is saved anew.

    Raises:
        StageFailed: the folder holds no tokenizer that transformers can load.
    """
    if (source / "tokenizer.json").exists() and _names_its_class(source / "tokenizer_config.json"):
        copy_tokenizer_files(source, folder)
    else:
        load_tokenizer(source).save_pretrained(folder)
    if (source / "config.json").exists():
        shutil.copyfile(source / "config.json", folder / "config.json")
    return load_tokenizer(folder)


def _names_its_class(path: Path) -> bool:
    """Return whether a tokenizer's config can do without the model's config beside it."""
    return path.exists() and bool(json.loads(path.read_text()).get("tokenizer_class"))


def tokenizer_digest(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Hash what decides a text's token ids: vocabulary, merges, added tokens, normalizer, pre-tokenizer.

    Chat template, decoder, padding, truncation and the offsets of tokens are left out: two tokenizers with one digest
    give the same ids.

    Raises:
        StageFailed: it is no fast tokenizer.
    """
    parsed = json.loads(backend_of(tokenizer).to_str())
    canonical = {
        "model": parsed["model"],
        "added_tokens": sorted((token["id"], token["content"]) for token in parsed["added_tokens"]),
        "normalizer": parsed["normalizer"],
        "pre_tokenizer": _without_offsets(parsed["pre_tokenizer"]),
    }
    return hashlib.sha256(json.dumps(canonical, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def vocabulary_size(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return the highest token id + 1: how many logits a model needs at least (many have more, padded).

    Raises:
        StageFailed: it is no fast tokenizer.
    """
    return 1 + max(backend_of(tokenizer).get_vocab(with_added_tokens=True).values(), default=-1)


def backend_of(tokenizer: "PreTrainedTokenizerBase") -> Any:
    """Return the `tokenizers.Tokenizer` of a tokenizer.

    Raises:
        StageFailed: it has none.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise StageFailed(
            f"the tokenizer {tokenizer.name_or_path!r} is a slow {type(tokenizer).__name__}; expected a fast one: save "
            "it again with `save_pretrained` of a fast tokenizer, which writes tokenizer.json"
        )
    return backend


def _without_offsets(value: Any) -> Any:
    """Drop `trim_offsets`, which moves tokens' places in the text and no id."""
    if isinstance(value, dict):
        return {key: _without_offsets(item) for key, item in value.items() if key != "trim_offsets"}
    return [_without_offsets(item) for item in value] if isinstance(value, list) else value
