"""The parts of the scoring that need neither a model nor Ray; its output heads are in `models/test_heads.py`."""

import numpy as np
import torch

from stages.evaluate.scoring import DocumentSums, NoiseFloor, Reference, score_batches
from stages.formats.tokens import TokenRows
from stages.models.heads import observe_head
from tests.stages.tiny import tiny_llama


def rows_of(num: int) -> TokenRows:
    ids = np.random.default_rng(0).integers(0, 96, (num, 16), dtype=np.int32)
    mask = np.ones((num, 16), bool)
    mask[:, 0] = False
    places = np.tile(np.arange(16, dtype=np.int32), (num, 1))
    return TokenRows(ids, np.zeros((num, 16), np.int64), mask, places)


def score(batch: TokenRows, *, ties: bool = False, **options):
    """Score a model against itself with a head that may give every word the same logit."""
    model = tiny_llama()
    if ties:
        torch.nn.init.zeros_(model.lm_head.weight)
    head, sums = observe_head(model, torch.as_tensor(batch.ids_RT).long(), 96), DocumentSums()
    (states,) = score_batches(model, head, [batch], references={}, sums=DocumentSums(), name="teacher", **options)
    references = {"teacher": Reference(head, iter([states]))}
    list(score_batches(model, head, [batch], references=references, sums=sums, name="student"))
    return sums.arrays()


def test_noise_floor_is_a_model_against_itself_in_other_batches():
    for num in (1, 6):
        floor = NoiseFloor()
        score(rows_of(num), floor=floor)
        assert floor.sums["tokens"] == num * 15 == floor.sums["agree/self"]
        assert abs(floor.sums["kl/self"]) < 1e-4 * floor.sums["tokens"]
        assert floor.sums["nll"] > 0
        assert not floor.is_measured


def test_models_agree_where_their_likeliest_tokens_tie():
    found = score(rows_of(2), ties=True)
    assert found["agree/teacher"].tolist() == [30]


def test_document_sums_add_up_over_batches():
    sums = DocumentSums()
    sums.add(np.array([9, 4, 9]), {"tokens": np.ones(3), "nll": np.array([1.0, 2.0, 3.0])})
    sums.add(np.array([4]), {"tokens": np.ones(1), "nll": np.array([0.5])})
    arrays = sums.arrays()
    assert arrays["document_id"].tolist() == [4, 9]
    assert arrays["tokens"].tolist() == [2, 2]
    assert arrays["nll"].tolist() == [2.5, 4.0]
