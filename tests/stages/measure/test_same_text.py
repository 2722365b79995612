"""Whether a runtime's greedy tokens are what transformers would write, up to rounding."""

import gc
import weakref

import pytest
import torch

from stages.measure.same_text import compare_text, release_memory, text_prompts
from stages.models.checkpoints import load_model
from tests.stages.evaluate.tiny import VOCABULARY, save_model, save_tokenizer

PROMPTS = [[3, 4, 5], [6, 7]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, seed=0)
    return folder


def greedy(folder, prompt, dtype, num=6):
    model, ids = load_model(folder, dtype=dtype), list(prompt)
    with torch.inference_mode():
        for _ in range(num):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_greedy_tokens_of_transformers_are_its_own(folder, dtype):
    written = [greedy(folder, prompt, dtype) for prompt in PROMPTS]
    found = compare_text(folder, PROMPTS, written, dtype=dtype, device="cpu")
    assert found.holds
    assert found.tokens == 12
    assert 0 < found.rounding < {"float32": 1e-4, "bfloat16": 0.2}[dtype]


def test_another_text_is_found_with_its_first_difference(folder):
    written = [greedy(folder, prompt, "float32") for prompt in PROMPTS]
    written[1][2] = (written[1][2] + 7) % 64
    found = compare_text(folder, PROMPTS, written, dtype="float32", device="cpu")
    assert not found.holds
    assert found.first_difference == 2
    assert found.largest_gap > 1e-3
    assert "rounding does not explain it" in found.text


def test_prompts_are_sentences_where_there_is_a_tokenizer_and_ids_where_not(folder, tmp_path):
    assert text_prompts(folder, max_tokens=3, vocab_size=64, seed=0) == text_prompts(
        folder, max_tokens=3, vocab_size=64, seed=0
    )
    save_tokenizer(tmp_path, VOCABULARY)
    found = text_prompts(tmp_path, max_tokens=3, vocab_size=64, seed=0)
    assert len(found) == 4
    assert {len(prompt) for prompt in found} == {3}


def test_memory_of_a_model_that_is_no_longer_used_is_given_back_to_the_device(folder, monkeypatch):
    """Of one in a cycle too, which only the collector frees."""
    model = load_model(folder)
    model.__dict__["itself"] = [model]
    alive, found = weakref.ref(model), []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: found.append(alive()))
    gc.disable()
    try:
        del model
        release_memory()
    finally:
        gc.enable()
    assert found == [None]
