"""Tokenizers on disk: what is equal, what is copied, how many tokens there are."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from stages.errors import StageFailed
from stages.models.tokenization import (
    copy_tokenizer,
    copy_tokenizer_files,
    load_tokenizer,
    tokenizer_digest,
    vocabulary_size,
)


def write_as_on_the_hub(folder: Path) -> Path:
    """A tokenizer as Qwen3's lies on the hub: its class rebuilds the pre-tokenizer when it is loaded and saved."""
    backend = Tokenizer(models.BPE({"a": 0, "b": 1, "Ġ": 2, "ab": 3}, [("a", "b")]))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    folder.mkdir(parents=True)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>").save_pretrained(folder)
    parsed = json.loads((folder / "tokenizer.json").read_text())
    # As files of 2020 are: keys that have a default are not there, and merges are text.
    for key in ("type", "byte_fallback", "ignore_merges"):
        del parsed["model"][key]
    parsed["model"]["merges"] = [" ".join(pair) for pair in parsed["model"]["merges"]]
    (folder / "tokenizer.json").write_text(json.dumps(parsed))
    return folder


def digest_of(folder: Path) -> str:
    return tokenizer_digest(load_tokenizer(folder))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_as_on_the_hub(tmp_path / "source")


def edit(folder: Path, change: dict[str, Any]) -> None:
    parsed = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**parsed, **change}))


def test_tokenizer_in_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StageFailed, match="cannot load the tokenizer"):
        load_tokenizer(tmp_path)


def test_digest_is_stable_under_formatting_saving_and_what_moves_no_id(source: Path, tmp_path: Path) -> None:
    before = digest_of(source)
    load_tokenizer(source).save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/tokenizer.json").read_bytes() != (source / "tokenizer.json").read_bytes()
    assert digest_of(tmp_path / "again") == before
    parsed = json.loads((source / "tokenizer.json").read_text())
    parsed["truncation"] = {"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    parsed["pre_tokenizer"]["trim_offsets"] = False
    (source / "tokenizer.json").write_text(json.dumps(dict(reversed(parsed.items())), indent=8))
    assert digest_of(source) == before


@pytest.mark.parametrize("part", ["vocab", "merges", "normalizer"])
def test_digest_changes_with_what_decides_ids(source: Path, part: str) -> None:
    before = digest_of(source)
    model = json.loads((source / "tokenizer.json").read_text())["model"]
    changes: dict[str, dict[str, Any]] = {
        "vocab": {"model": {**model, "vocab": {**model["vocab"], "a": 1, "b": 0}}},
        "merges": {"model": {**model, "merges": []}},
        "normalizer": {"normalizer": {"type": "Lowercase"}},
    }
    edit(source, changes[part])
    assert digest_of(source) != before


def test_vocabulary_size_counts_added_tokens_and_gaps(source: Path) -> None:
    assert vocabulary_size(load_tokenizer(source)) == 5
    parsed = json.loads((source / "tokenizer.json").read_text())
    parsed["model"]["vocab"]["c"] = 9
    edit(source, {"model": parsed["model"]})
    assert vocabulary_size(load_tokenizer(source)) == 10


def test_copied_tokenizer_is_the_very_files_and_the_config_that_its_class_follows_from(
    source: Path, tmp_path: Path
) -> None:
    (source / "model.safetensors").write_text("weights")
    (source / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "copy").mkdir()
    copy_tokenizer(source, tmp_path / "copy")
    assert {path.name for path in (tmp_path / "copy").iterdir()} == {
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    (tmp_path / "student").mkdir()
    copy_tokenizer_files(tmp_path / "copy", tmp_path / "student")
    assert not (tmp_path / "student/config.json").exists()
    for folder in ("copy", "student"):
        assert (tmp_path / folder / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
        assert digest_of(tmp_path / folder) == digest_of(source)


def test_copied_tokenizer_that_needs_its_models_config_can_do_without_and_is_the_same(
    source: Path, tmp_path: Path
) -> None:
    settings = json.loads((source / "tokenizer_config.json").read_text())
    del settings["tokenizer_class"]
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    (source / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "copy").mkdir()
    copy_tokenizer(source, tmp_path / "copy")
    (tmp_path / "copy/config.json").unlink()
    assert digest_of(tmp_path / "copy") == digest_of(source)
