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
    "canonical_tokenizer",
    "copy_tokenizer",
    "copy_tokenizer_files",
    "difference",
    "has_same_class",
    "has_tokenizer",
    "load_tokenizer",
    "read_tokenizer",
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


def read_tokenizer(folder: Path | None) -> Any:
    """Read `tokenizer.json` as it is, without transformers, which may change it; None where there is none."""
    from tokenizers import Tokenizer

    if folder is None or not (folder / "tokenizer.json").exists():
        return None
    try:
        return Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises no other type
        raise StageFailed(f"{folder / 'tokenizer.json'} is no tokenizer: {error}; copy the checkpoint again") from error


def has_same_class(one: Path, other: Path) -> bool:
    """Return whether transformers makes the same of two folders' equal `tokenizer.json`, by what their configs say."""
    configs = []
    for folder in (one, other):
        path = folder / "tokenizer_config.json"
        found = json.loads(path.read_text()) if path.exists() else {}
        configs.append({key: found.get(key) for key in CLASS_KEYS})
    return configs[0] == configs[1]


CLASS_KEYS = ("tokenizer_class", "add_bos_token", "add_eos_token", "add_prefix_space", "legacy", "added_tokens_decoder")
"""Of `tokenizer_config.json`: what may change the ids that transformers makes of a text."""


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
    """Hash what decides a text's token ids.

    Two tokenizers with one digest give every text the same ids, whatever else their files say: chat template, decoder,
    padding, truncation, names of special tokens, the offsets of tokens, and ways to write one thing are left out.

    Raises:
        StageFailed: it is no fast tokenizer.
    """
    canonical = canonical_tokenizer(backend_of(tokenizer))
    return hashlib.sha256(json.dumps(canonical, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def canonical_tokenizer(backend: Any) -> dict[str, Any]:
    """Return what decides a text's token ids in a `tokenizers.Tokenizer`, each part written in one way."""
    parsed = json.loads(backend.to_str())
    normalizer = _steps(parsed["normalizer"])
    return {
        "model": {key: value for key, value in parsed["model"].items() if value not in (None, "", False)},
        "added_tokens": sorted(_added(token, has_normalizer=bool(normalizer)) for token in parsed["added_tokens"]),
        "normalizer": normalizer,
        "pre_tokenizer": _steps(parsed["pre_tokenizer"]),
        "around": _around(backend),
    }


def difference(one: dict[str, Any], other: dict[str, Any]) -> str:
    """Say in what two canonical tokenizers differ first."""
    for part, name in {"added_tokens": "added token", "model": "token"}.items():
        ids = [_ids(tokenizer[part]) for tokenizer in (one, other)]
        if odd := sorted(set(ids[0].items()) ^ set(ids[1].items()), key=str):
            text = odd[0][0]
            return f"the {name} {text!r} has the id {ids[0].get(text)} in one and {ids[1].get(text)} in the other"
    differing = [part for part in one if one[part] != other[part]]
    names = {"around": "the tokens that begin and end a text", "added_tokens": "how added tokens are found"}
    return f"{' and '.join(names.get(part, f'the {part}') for part in differing)} differ"


def _ids(part: Any) -> dict[str, Any]:
    """Return token → id of added tokens, or of a model's vocabulary (a list of token and score in a unigram model)."""
    if isinstance(part, list):
        return {token[1]: token[0] for token in part}
    vocabulary = part.get("vocab", {})
    return {entry[0]: i for i, entry in enumerate(vocabulary)} if isinstance(vocabulary, list) else vocabulary


def _added(token: dict[str, Any], *, has_normalizer: bool) -> tuple[Any, ...]:
    spaces = tuple(bool(token[name]) for name in ("lstrip", "rstrip", "single_word"))
    return (token["id"], token["content"], *spaces, bool(token["normalized"]) and has_normalizer)


def _steps(part: Any) -> list[Any]:
    """Return a normalizer or pre-tokenizer as the list of its steps, without `trim_offsets`, which changes no id."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        (inner,) = (value for key, value in part.items() if key != "type")
        return [step for each in inner for step in _steps(each)]
    return [{key: value for key, value in part.items() if key != "trim_offsets"}]


def _around(backend: Any) -> list[list[int]]:
    """Return what is put before and after a text, whichever post-processor does it."""
    with_special, plain = (
        [token for token, mask in zip(found.ids, found.attention_mask, strict=True) if mask]
        for found in (backend.encode("a", add_special_tokens=special) for special in (True, False))
    )
    for start in range(len(with_special) - len(plain) + 1):
        if plain and with_special[start : start + len(plain)] == plain:
            return [with_special[:start], with_special[start + len(plain) :]]
    return [with_special, []]


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
