"""Loading and saving of tiny models and tokenizers, and what is refused."""

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from stages.errors import OutOfMemory, StageFailed, Transient
from stages.models.checkpoints import (
    add_to_index,
    bytes_in_16_bits,
    dtype_in_16_bits,
    load_model,
    model_config,
    save_checkpoint,
    stored_dtype,
    stored_tensors,
)
from stages.models.tokenization import load_tokenizer
from stages.storage import Folder


def tiny_model() -> Any:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, tie_word_embeddings=True, **shape))


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    save_checkpoint(tiny_model(), tmp_path / "tokenizer", Folder.at(tmp_path), "model")
    return tmp_path / "model"


def test_checkpoint_saved_and_loaded_is_the_same_model(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = load_model(saved)
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(model(ids).logits, tiny_model().eval()(ids).logits)
    assert not model.training
    assert load_model(saved, dtype="bfloat16").dtype == torch.bfloat16
    assert load_tokenizer(saved)("ab")["input_ids"] == [2]
    assert model_config(saved)["vocab_size"] == 32
    assert capfd.readouterr() == ("", "")
    assert not list(saved.glob("*.bin"))


def test_checkpoint_saved_to_a_remote_folder_is_uploaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Folder, "local_path", lambda self: None)
    save_checkpoint(tiny_model(), None, Folder.at(tmp_path), "finalists/a")
    assert {path.name for path in (tmp_path / "finalists/a").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }


def drop_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def reshape_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(8)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def edit_config(**change: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps(model_config(folder) | change))

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_weight, r"1 missing keys, such as model\.norm\.weight"),
        (reshape_weight, "cannot load|mismatched"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"no tensors"), "cannot load the model"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"has no \*\.safetensors weights"),
        (lambda folder: (folder / "config.json").unlink(), r"has no config\.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "is not JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "holds a list, expected an object"),
        (edit_config(model_type="unheard-of", architectures=["X"]), "cannot load the model"),
    ],
    ids=["missing", "shape", "corrupt", "absent", "no-config", "bad-config", "list-config", "architecture"],
)
def test_model_that_is_not_what_its_config_says_is_refused(
    saved: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(saved)
    with pytest.raises(StageFailed, match=message):
        load_model(saved)


def test_model_with_an_unknown_dtype_is_refused(saved: Path) -> None:
    with pytest.raises(StageFailed, match="dtype='float12' is no type of torch"):
        load_model(saved, dtype="float12")


def test_model_pickled_only_is_never_opened(saved: Path) -> None:
    (saved / "model.safetensors").rename(saved / "pytorch_model.bin")
    with pytest.raises(StageFailed, match="has no"):
        load_model(saved)


@pytest.mark.parametrize("settings", [{"temperature": 0.7, "top_p": 0.6}, {"num_beams": 1, "early_stopping": True}])
def test_model_whose_generation_settings_transformers_refuses_to_save_is_saved(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    model = tiny_model()
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    save_checkpoint(model, None, Folder.at(tmp_path), "model")
    again = load_model(tmp_path / "model")
    if "temperature" in settings:
        kept = again.generation_config
        assert (kept.temperature, kept.top_p, kept.do_sample) == (0.7, 0.6, True)


@pytest.mark.parametrize(
    ("raised", "kind"),
    [
        (OSError(errno.ESTALE, "Stale file handle"), Transient),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), OutOfMemory),
        (torch.OutOfMemoryError("CUDA out of memory"), OutOfMemory),
        (OSError("no file named model.safetensors"), StageFailed),
    ],
    ids=["stale", "host", "device", "broken"],
)
def test_model_that_cannot_be_loaded_for_now_is_told_from_a_broken_one(
    saved: Path, monkeypatch: pytest.MonkeyPatch, raised: Exception, kind: type[StageFailed]
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise raised

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", refuse)
    with pytest.raises(StageFailed) as caught:
        load_model(saved)
    assert type(caught.value) is kind


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stored_dtype_is_that_of_the_weights_on_disk(tmp_path: Path, dtype: torch.dtype) -> None:
    tiny_model().to(dtype).save_pretrained(tmp_path)
    assert stored_dtype(tmp_path) is dtype


@pytest.mark.parametrize(
    ("dtype", "in_16_bits"),
    [(torch.float32, "bfloat16"), (torch.bfloat16, "bfloat16"), (torch.float16, "float16")],
)
def test_bytes_and_type_in_16_bits_are_the_same_however_a_checkpoint_is_stored(
    tmp_path: Path, dtype: torch.dtype, in_16_bits: str
) -> None:
    model = tiny_model().to(dtype)
    model.save_pretrained(tmp_path, max_shard_size="2KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert bytes_in_16_bits(tmp_path) == 2 * sum(parameter.numel() for parameter in model.parameters())
    assert dtype_in_16_bits(tmp_path) == in_16_bits
    found = stored_tensors(tmp_path)["model.embed_tokens.weight"]
    assert (found.shape, found.num_elements, found.size_bytes) == ((32, 16), 512, 512 * dtype.itemsize)


def test_tensor_that_is_entered_into_the_index_is_found_there(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path, max_shard_size="2KB")
    add_to_index(tmp_path, {"lm_head.weight_scale": "model-00001-of-00002.safetensors"})
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"]["lm_head.weight_scale"] == "model-00001-of-00002.safetensors"
    assert "model.embed_tokens.weight" in index["weight_map"]
