"""Kneser-Ney bigrams and trigrams: what a model must beat to have learned more than counting does.

Interpolated with modified discounts (Chen & Goodman 1998, section 2.8 and appendix): the highest order counts
n-grams, a lower one counts in how many contexts an n-gram stands; below the unigrams all words are equally likely, so
that none has probability 0. Discounts are those of counts of counts, `Dₖ = k - (k + 1) Y nₖ₊₁/nₖ` with `Y = n₁/(n₁ +
2n₂)`.

A token's n-gram is itself and the two before it in its document; before a document's (or row's) beginning stands a
word of its own. Promises: probabilities over the vocabulary sum to 1; 5 million tokens take some seconds. Exact;
pure.

Shapes: N targets, U distinct n-grams, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from stages.formats.tokens import TokenRows

__all__ = ["KneserNey", "target_ngrams"]

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
UNKNOWN_DISCOUNTS = (0.5, 1.0, 1.5)
"""Where a count of counts is 0, as in very small texts: KenLM's `--discount_fallback`."""


def target_ngrams(rows: TokenRows, vocabulary_size: int) -> Ints:
    """Return each target's trigram `[N, 3]`, the target last; `vocabulary_size` stands for what is before a "
    "document."""
    found = [rows.ids_RT.astype(np.int64)]
    same_RT = rows.mask_RT
    for back in (1, 2):
        shifted, owner = np.roll(rows.ids_RT, back, axis=1), np.roll(rows.document_ids_RT, back, axis=1)
        same_RT = same_RT & (owner == rows.document_ids_RT)
        same_RT[:, :back] = False
        found.insert(0, np.where(same_RT, shifted, vocabulary_size))
    return np.stack([each[rows.mask_RT] for each in found], axis=1)


@dataclass(frozen=True, slots=True)
class Level:
    """The n-grams of one order: keys in a number system of V + 1 digits, whose last is the predicted word."""

    keys_U: Ints
    discounted_U: Floats
    """Count minus discount, over the context's total."""
    contexts_U: Ints
    """Keys of the contexts, sorted."""
    backoff_U: Floats
    """Of each context: the mass that the lower order shares."""

    @classmethod
    def of(cls, keys_U: Ints, counts_U: Ints, base: int) -> Self:
        """Make a level of distinct sorted keys and their counts."""
        capped_U = np.minimum(counts_U, 3)
        discounts_U = np.array([0.0, *_discounts(counts_U)])[capped_U]
        contexts_U, index_U = np.unique(keys_U // base, return_inverse=True)
        totals_U = np.bincount(index_U, weights=counts_U)
        taken_U = np.bincount(index_U, weights=discounts_U)
        return cls(keys_U, (counts_U - discounts_U) / totals_U[index_U], contexts_U, taken_U / totals_U)

    def probabilities(self, keys_N: Ints, lower_N: Floats, base: int) -> Floats:
        """Return the probability of each n-gram, given those of the lower order."""
        contexts_N = keys_N // base
        place_N, known_N = _find(self.contexts_U, contexts_N)
        backoff_N = np.where(known_N, self.backoff_U[place_N], 1.0)
        place_N, known_N = _find(self.keys_U, keys_N)
        return np.where(known_N, self.discounted_U[place_N], 0.0) + backoff_N * lower_N


@dataclass(frozen=True, slots=True)
class KneserNey:
    """A bigram and a trigram model of the same tokens."""

    vocabulary_size: int
    unigrams_V: Floats
    bigrams: Level
    """By how often they stand there: the bigram model's highest order."""
    continued: Level
    """Bigrams by the number of words before them: the trigram model's middle order."""
    trigrams: Level

    @classmethod
    def of(cls, ngrams_N3: Ints, vocabulary_size: int) -> Self:
        """Count the n-grams of targets, as `target_ngrams` returns them; at least one."""
        base = vocabulary_size + 1
        keys_U, counts_U = np.unique(ngrams_N3 @ np.array([base * base, base, 1]), return_counts=True)
        trigrams = Level.of(keys_U, counts_U, base)
        pairs_U, before_U = np.unique(keys_U % (base * base), return_counts=True)
        continued = Level.of(pairs_U, before_U, base)
        bigrams = Level.of(*np.unique(ngrams_N3[:, 1:] @ np.array([base, 1]), return_counts=True), base)
        contexts_V = np.bincount(pairs_U % base, minlength=vocabulary_size)
        discounts_V = np.array([0.0, *_discounts(contexts_V)])[np.minimum(contexts_V, 3)]
        unigrams_V = (contexts_V - discounts_V + discounts_V.sum() / vocabulary_size) / contexts_V.sum()
        return cls(vocabulary_size, unigrams_V, bigrams, continued, trigrams)

    def log_probs(self, ngrams_N3: Ints) -> tuple[Floats, Floats]:
        """Return the log-probability of each target by the bigram and by the trigram model, in nats."""
        base = self.vocabulary_size + 1
        first_N = self.unigrams_V[ngrams_N3[:, 2]]
        pairs_N = ngrams_N3[:, 1:] @ np.array([base, 1])
        triples_N = ngrams_N3 @ np.array([base * base, base, 1])
        second_N = self.continued.probabilities(pairs_N, first_N, base)
        third_N = self.trigrams.probabilities(triples_N, second_N, base)
        return np.log(self.bigrams.probabilities(pairs_N, first_N, base)), np.log(third_N)


def _discounts(counts_U: Ints) -> tuple[float, ...]:
    """Return what is taken from counts of 1, of 2, and of 3 and more."""
    n1, n2, n3, n4 = (int((counts_U == count).sum()) for count in (1, 2, 3, 4))
    if 0 in (n1, n2, n3, n4):
        return UNKNOWN_DISCOUNTS
    y = n1 / (n1 + 2 * n2)
    found = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
    return found if all(0 <= discount <= k for k, discount in enumerate(found, 1)) else UNKNOWN_DISCOUNTS


def _find(sorted_U: Ints, wanted_N: Ints) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Return where values stand among sorted ones, and whether they do."""
    place_N = np.minimum(np.searchsorted(sorted_U, wanted_N), len(sorted_U) - 1)
    return place_N, sorted_U[place_N] == wanted_N
