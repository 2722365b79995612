"""Kneser-Ney against its definition, word by word in float64; what an n-gram of packed rows is."""

import numpy as np
import pytest

from stages.evaluate.ngrams import KneserNey, target_ngrams
from stages.formats.tokens import TokenRows
from tests.references import kneser_ney

VOCABULARY = 12


def some_ngrams(num: int, *, seed: int = 0) -> np.ndarray:
    """Trigrams of a text with a Zipf-like vocabulary, so that there are counts of every size."""
    rng = np.random.default_rng(seed)
    words = np.minimum(rng.geometric(0.25, num + 2) - 1, VOCABULARY - 2)
    return np.stack([words[:-2], words[1:-1], words[2:]], axis=1).astype(np.int64)


@pytest.mark.parametrize("num", [9, 400], ids=["too few for discounts of their own", "enough"])
def test_probabilities_are_those_of_the_definition(num):
    ngrams = some_ngrams(num)
    model = KneserNey.of(ngrams, VOCABULARY)
    asked = np.concatenate([ngrams, some_ngrams(200, seed=1)])
    bigram, trigram = model.log_probs(asked)
    for order, found in ((2, bigram), (3, trigram)):
        plain = [tuple(gram) for gram in ngrams.tolist()]
        expected = kneser_ney(plain, VOCABULARY, order)
        for gram, log_prob in zip(asked.tolist(), found, strict=True):
            context = tuple(gram[3 - order : -1])
            if context in expected:
                assert log_prob == pytest.approx(np.log(expected[context][gram[-1]]), abs=1e-10)


def test_probabilities_of_all_words_sum_to_one_in_seen_and_unseen_contexts():
    model = KneserNey.of(some_ngrams(300), VOCABULARY)
    words = np.arange(VOCABULARY)
    for context in ([0, 1], [11, 0], [11, 11], [VOCABULARY, VOCABULARY]):
        asked = np.concatenate([np.tile(context, (VOCABULARY, 1)), words[:, None]], axis=1)
        for found in model.log_probs(asked):
            assert np.exp(found).sum() == pytest.approx(1, abs=1e-12)


def test_trigram_predicts_its_own_training_text_better_than_the_bigram():
    rng = np.random.default_rng(2)
    text = np.tile(rng.integers(0, VOCABULARY, 50), 20)
    ngrams = np.stack([text[:-2], text[1:-1], text[2:]], axis=1)
    bigram, trigram = KneserNey.of(ngrams, VOCABULARY).log_probs(ngrams)
    assert bigram.mean() < trigram.mean() < 0


def test_ngrams_of_rows_stop_at_the_borders_of_documents_and_rows():
    rows = TokenRows(
        np.array([[1, 2, 3, 4, 5, 6], [7, 8, 9, 1, 1, 1]], np.int32),
        np.array([[10, 10, 10, 20, 20, 20], [20, 20, 20, -1, -1, -1]], np.int64),
        np.array([[0, 1, 1, 0, 1, 1], [0, 1, 1, 0, 0, 0]], bool),
    )
    before = 99
    assert target_ngrams(rows, before).tolist() == [
        [before, 1, 2],
        [1, 2, 3],
        [before, 4, 5],
        [4, 5, 6],
        [before, 7, 8],
        [7, 8, 9],
    ]
