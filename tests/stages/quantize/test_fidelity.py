"""Distances to a reference, against float64, for models with and without a plain output head."""

import weakref
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from torch.utils._python_dispatch import TorchDispatchMode

from stages.contract import Artifact
from stages.errors import StageFailed
from stages.formats.tokens import TokenRows, predicts
from stages.quantize.fidelity import BasePredictions, fitting_micro_batch, measure_fidelity, predict
from stages.quantize.rows import read_distinct_rows


class Embedding(torch.nn.Module):
    """The least that a backbone is."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(256, 16)

    def forward(self, input_ids: torch.Tensor, use_cache: bool, position_ids: Any = None) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.embed(input_ids))


class Toy(torch.nn.Module):
    """The least that a causal language model is: embedding, head, logits; optionally soft-capped."""

    def __init__(self, seed: int, cap: float | None = None, bias: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.base_model = Embedding()
        self.head = torch.nn.Linear(16, 256, bias=bias)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
        self.cap = cap
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=256))
        self.device, self.dtype = torch.device("cpu"), torch.float32

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.head

    def forward(self, input_ids: torch.Tensor, use_cache: bool, position_ids: Any = None) -> SimpleNamespace:
        logits = self.head(self.base_model(input_ids, use_cache=use_cache).last_hidden_state)
        return SimpleNamespace(logits=logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap)


@pytest.fixture(scope="module")
def rows(data: Artifact) -> TokenRows:
    rows = read_distinct_rows(data.paths("tokens/calibration-*.parquet")).take(np.arange(7))
    rows.mask_RT[2, 6:21] = False
    return rows


def log_probs(model: Toy, rows: TokenRows, vocabulary_size: int = 256) -> np.ndarray:
    with torch.no_grad():
        logits = model(torch.tensor(rows.ids_RT, dtype=torch.long), use_cache=False).logits
    return log_softmax(logits.double().numpy()[predicts(rows.mask_RT)][:, :vocabulary_size], axis=-1)


def predicted(model: Toy, rows: TokenRows, micro_batch: int = 4, vocabulary_size: int = 256) -> BasePredictions:
    return predict(model, rows, vocabulary_size=vocabulary_size, micro_batch=micro_batch, device="cpu")


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("cap", [None, 3.0], ids=["linear", "soft-capped"])
def test_fidelity_is_the_mean_kl_of_float64_for_any_micro_batch(rows: TokenRows, cap: float | None, bias: bool) -> None:
    base, other = Toy(0, cap, bias), Toy(1, cap, bias)
    p, q = log_probs(base, rows), log_probs(other, rows)
    kls = (np.exp(p) * (p - q)).sum(-1)
    predictions = predicted(base, rows, 3)
    assert (predictions.head.weight is None) == (cap is not None)
    for micro_batch in (1, 4, 7):
        found = measure_fidelity(other, predictions, micro_batch=micro_batch, device="cpu")
        assert found.kl == pytest.approx(kls.mean(), rel=1e-5)
        assert found.kl_p99 == pytest.approx(np.percentile(kls, 99), rel=1e-4)
        assert found.agreement == (p.argmax(-1) == q.argmax(-1)).mean()
        assert found.num_tokens == predicts(rows.mask_RT).sum()


def test_fidelity_is_normalized_over_the_datasets_vocabulary_not_the_padded_head(rows: TokenRows) -> None:
    rows = replace(rows, ids_RT=rows.ids_RT % 100)
    base, other = Toy(0), Toy(1)
    p, q = log_probs(base, rows, 100), log_probs(other, rows, 100)
    found = measure_fidelity(other, predicted(base, rows, 3, vocabulary_size=100), micro_batch=2, device="cpu")
    assert found.kl == pytest.approx((np.exp(p) * (p - q)).sum(-1).mean(), rel=1e-5)
    assert found.agreement == (p.argmax(-1) == q.argmax(-1)).mean()


def test_fidelity_of_the_model_itself_is_zero(rows: TokenRows) -> None:
    base = Toy(0)
    found = measure_fidelity(base, predicted(base, rows, 2), micro_batch=7, device="cpu")
    assert found.kl == pytest.approx(0, abs=1e-6)
    assert found.agreement == 1


def test_predictions_of_whole_logits_are_held_once(rows: TokenRows) -> None:
    """A batch's logits go into the result at once, instead of being kept until all are joined."""
    made: list[weakref.ref[torch.Tensor]] = []
    most = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal most
            found = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.index.Tensor and found.dim() == 2:
                made.append(weakref.ref(found))
                most = max(most, sum(one() is not None for one in made))
            return found

    with Watch():
        predictions = predicted(Toy(0, cap=3.0), rows, micro_batch=1)
    assert len(made) == len(rows)
    assert most <= 2
    np.testing.assert_allclose(predictions.states.array, predicted(Toy(0, cap=3.0), rows).states.array, rtol=1e-5)


def test_fidelity_of_a_model_that_says_nan_is_an_error(rows: TokenRows) -> None:
    predictions = predicted(Toy(0), rows)
    broken = Toy(1)
    broken.head.weight.data[0, 0] = float("nan")
    with pytest.raises(StageFailed, match="KL to the unquantized model is nan"):
        measure_fidelity(broken, predictions, micro_batch=4, device="cpu")


@pytest.mark.parametrize(
    ("given", "vocabulary", "expected"),
    [(5, 10**6, 5), (None, 4096, 16), (None, 128_256, 1)],
    ids=["given", "small", "large"],
)
def test_micro_batch_that_is_not_given_keeps_logits_within_the_budget(
    given: int | None, vocabulary: int, expected: int
) -> None:
    sequence_length = 2048 if vocabulary == 128_256 else 512
    assert fitting_micro_batch(given, sequence_length=sequence_length, vocabulary_size=vocabulary) == expected
