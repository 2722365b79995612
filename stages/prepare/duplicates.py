"""Near duplicates: which documents are almost the same text, and so must fall on one side of the split.

Two documents are near duplicates where the Jaccard similarity of their shingles (runs of five words, without case and
punctuation) is at least a threshold, estimated by MinHash (Broder 1997) of 128 permutations: its standard error is
0.035 at 0.8. Candidates come from banding (Leskovec et al., Mining of Massive Datasets, 3.4), so that not every pair is
compared. All that are connected by near duplicates are one cluster, and its side is that of its smallest digest.

What is compared is what is learned: of a labelled row the completion, of a chat the answers that are targets. An
instruction that all rows share would make all of them alike. Answers of less than `MIN_ANSWER_SHINGLES` runs of words
("yes") are not compared. A cluster that is larger than half of the smallest split that is held out (texts made from one
template) is left divided by its documents' own content, and counted: on one side it would leave another without text,
or be most of it.

Promise: sides follow from the documents' content and the seed alone, whatever the number of workers or the order.
Does not: remove a document, find one that is contained in a much longer one, or compare questions.

Shapes: N documents, P permutations.
"""

import io
import json
import re
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.formats.dataset import Duplicates
from stages.prepare.chats import calls
from stages.prepare.division import SPLITS, Division, Moves
from stages.prepare.documents import Document, PartReader, Schema
from stages.prepare.parts import Part
from stages.storage import Folder

FOLDER = "signatures"
"""Below `resume/`."""
SHINGLE_WORDS = 5
"""As Gopher's MassiveText, FineWeb and most others compare web texts (arXiv:2112.11446, A.1; arXiv:2406.17557)."""
MIN_ANSWER_SHINGLES = 9
"""Of n < 9 runs, 12 words at most, two texts of which a word differs have at most (n − 1) / (n + 1) < 0.8 in common:
what is found among them is mostly equal answers to other questions, which are no copies."""
PERMUTATIONS = 128
RECORD = np.dtype([("digest", "<u8", 4), ("sketch", "<u4", PERMUTATIONS), ("words", "?")])
"""One document: its digest, its MinHash, and whether it has words enough to compare."""
BATCH = 8192
"""Shingles or pairs that are worked on at a time: some 4 MB."""
SPACELESS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff"
"""Scripts that put no spaces between words (Thai, Burmese, Khmer, Chinese, Japanese) or long ones (Korean): each
character counts as a word."""
_WORD = re.compile(rf"[^\W{SPACELESS}]+|[{SPACELESS}]")


def sign_part(part: Part, *, schema: Schema, text_field: str, folder: Folder) -> None:
    """Write the digests and signatures of a part's documents."""
    documents = (document for _, document in PartReader(part, schema, text_field))
    records = np.fromiter(map(_record, documents), RECORD)
    sink = io.BytesIO()
    np.save(sink, records)
    folder.put(f"{part.index:05d}.npy", sink.getvalue())


def signed_parts(folder: Folder) -> frozenset[int]:
    """Return the parts whose signatures are written."""
    return frozenset(int(entry.name.removesuffix(".npy")) for entry in folder.entries())


def _record(document: Document) -> tuple[NDArray[np.uint64], NDArray[np.uint32], bool]:
    hashes = shingles(compared_text(document))
    fewest = 1 if document.schema == "text" else MIN_ANSWER_SHINGLES
    return np.frombuffer(document.digest, "<u8"), sketch(hashes), len(hashes) >= fewest


def compared_text(document: Document) -> str:
    """Return what of a document is compared with others: what is learned of it, what its answers call included."""
    answers = [m for i, m in enumerate(document.messages) if m["role"] == "assistant" and i not in document.masked]
    called = (json.dumps(m["tool_calls"], ensure_ascii=False) for m in answers if calls(m))
    return "\n".join(filter(None, [*(m["content"] for m in answers), *called, document.text]))


def shingles(text: str) -> NDArray[np.uint64]:
    """Return hashes of a text's runs of words; of one that is shorter than a run, of all its words."""
    words = _WORD.findall(text.casefold())
    hashes = np.fromiter((zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in words), np.uint64, len(words))
    found = np.zeros(max(len(words) - SHINGLE_WORDS + 1, min(len(words), 1)), np.uint64)
    for i in range(min(SHINGLE_WORDS, len(words))):
        found = found * np.uint64(0x9E3779B97F4A7C15) + hashes[i : i + len(found)]  # a polynomial modulo 2^64
    found ^= found >> np.uint64(29)  # its low bits depend on few words
    return (found * np.uint64(0xBF58476D1CE4E5B9)) >> np.uint64(32)


def sketch(hashes: NDArray[np.uint64]) -> NDArray[np.uint32]:
    """Return the MinHash `[P]` of a set of hashes below 2^32."""
    minimum = _empty_sketch().copy()
    for start in range(0, len(hashes), BATCH):
        minimum.update_batch(hashes[start : start + BATCH].tolist())
    values: NDArray[np.uint32] = minimum.hashvalues
    return values


@lru_cache(maxsize=1)
def _empty_sketch() -> Any:
    from datasketch import MinHash

    return MinHash(num_perm=PERMUTATIONS, seed=1, hashfunc=int, scheme="affine32")  # hashed already


@dataclass(frozen=True, slots=True)
class Clusters:
    """Distinct documents by the cluster that each is in."""

    digests_N4: NDArray[np.uint64]
    copies_N: NDArray[np.int64]
    """How many documents have that content."""
    cluster_N: NDArray[np.int64]


def keep_together(folder: Folder, division: Division, similarity: float) -> tuple[Division, Duplicates]:
    """Return a division in which near duplicates fall on one side, and how many there are.

    Args:
        folder: the signatures of all parts.
        division: by which each document falls on a side of its own.
        similarity: estimated Jaccard similarity from which on documents are near duplicates.
    """
    with tempfile.TemporaryFile(prefix="signatures-") as file:
        for entry in sorted(folder.entries(), key=lambda entry: entry.name):
            np.load(io.BytesIO(folder.get(entry.name))).tofile(file)
        file.flush()
        if not file.tell():
            return division, Duplicates(similarity=similarity, exact=0, near=0, moved=0)
        clusters = find_clusters(np.memmap(file, RECORD, "r"), similarity)
    _, inverse_N, distinct_C = np.unique(clusters.cluster_N, return_inverse=True, return_counts=True)
    sizes_C = np.where(distinct_C > 1, np.bincount(inverse_N, weights=clusters.copies_N), 0).astype(np.int64)
    is_divided_C = sizes_C > _most(division, int(clusters.copies_N.sum()))
    sides_N, moved_N = _sides(clusters, division, is_divided_C[inverse_N])
    duplicates = Duplicates(
        similarity=similarity,
        exact=int(clusters.copies_N.sum()) - len(clusters.copies_N),
        near=len(clusters.copies_N) - len(np.unique(clusters.cluster_N)),
        moved=int(clusters.copies_N[moved_N].sum()),
        largest=int(sizes_C.max()),
        divided=int(sizes_C[is_divided_C].sum()),
    )
    moves = Moves(clusters.digests_N4[moved_N, 0], sides_N[moved_N])
    return replace(division, moves=moves.sorted()), duplicates


def find_clusters(records: NDArray[np.void], similarity: float) -> Clusters:
    """Group documents that are connected by near duplicates."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    digests_N4, first_N, copies_N = np.unique(records["digest"], axis=0, return_index=True, return_counts=True)
    num = len(digests_N4)
    pairs = [pair for band in _bands(similarity) for pair in _similar_pairs(records, first_N, band, similarity)]
    one, other = (np.concatenate(side) for side in zip(*pairs, strict=True)) if pairs else (np.zeros(0, int),) * 2
    graph = coo_array((np.ones(len(one), np.bool_), (one, other)), (num, num))
    _, cluster_N = connected_components(graph, directed=False)
    return Clusters(digests_N4, copies_N, cluster_N.astype(np.int64))


def _bands(similarity: float) -> list[slice]:
    """Return the bands of a signature that find what is similar at best."""
    from datasketch import MinHashLSH

    # To miss a pair is worse than to compare one that is not similar, since each is compared.
    # Above 0.99 one band would be best, which datasketch refuses.
    plan = MinHashLSH(threshold=min(similarity, 0.99), num_perm=PERMUTATIONS, weights=(0.1, 0.9))
    return [slice(i * plan.r, (i + 1) * plan.r) for i in range(plan.b)]


def _similar_pairs(
    records: NDArray[np.void], rows_N: NDArray[np.int64], band: slice, similarity: float
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield pairs of documents that agree in a band and are similar: each with the first of its bucket and the last."""
    keys_N = np.zeros(len(rows_N), np.uint64)
    for column in range(band.start, band.stop):
        keys_N = (keys_N ^ records["sketch"][rows_N, column]) * np.uint64(0x9E3779B97F4A7C15)
    has_words_N = records["words"][rows_N]
    order = np.flatnonzero(has_words_N)[np.argsort(keys_N[has_words_N], kind="stable")]
    begins = np.flatnonzero(np.diff(keys_N[order], prepend=~keys_N[order[:1]]) != 0)
    firsts = np.repeat(order[begins], np.diff(begins, append=len(order)))
    previous = np.concatenate([order[:1], order[:-1]])
    for partners in (firsts, previous):
        candidates = np.flatnonzero((partners != order) & (keys_N[partners] == keys_N[order]))
        for start in range(0, len(candidates), BATCH):
            chosen = candidates[start : start + BATCH]
            one, other = partners[chosen], order[chosen]
            equal = records["sketch"][rows_N[one]] == records["sketch"][rows_N[other]]
            similar = equal.mean(axis=1) >= similarity
            yield one[similar], other[similar]


def _most(division: Division, num_documents: int) -> float:
    """Return how many documents a cluster may have that falls on one side as a whole."""
    fractions = [fraction for fraction in division.fractions.values() if fraction > 0]
    held_out = min(fractions) if len(fractions) > 1 else 2.0  # with one side there is nothing to divide
    return max(1.0, held_out * num_documents / 2)


def _sides(
    clusters: Clusters, division: Division, is_divided_N: NDArray[np.bool_]
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Return each document's side as an index of `SPLITS`, and whether it is another than its own."""
    own_N = np.array([SPLITS.index(division.side(digest.tobytes())) for digest in clusters.digests_N4], np.uint8)
    # Digests are in order, so that the first of a cluster is its smallest.
    _, first_C, inverse_N = np.unique(clusters.cluster_N, return_index=True, return_inverse=True)
    sides_N = np.where(is_divided_N, own_N, own_N[first_C][inverse_N])
    return sides_N, sides_N != own_N
