"""Packs encoded documents into rows of equal length, and writes them as a Parquet shard.

Promise: documents follow one another without a gap; only the last row is padded, on the right. The concatenated rows
without padding are the concatenated documents, less rows that have no target, from which nothing can be learned (a
last row of one token, the middle of a long prompt). Deterministic bytes for equal documents.
Does not: mask attention between documents of one row: as usual in pretraining, the end-of-text token parts them.

Shapes: N rows, T tokens in a row.
"""

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stages.prepare.encoding import Encoded

ROW_GROUP_TOKENS = 4 * 1024 * 1024
"""Tokens in one Parquet row group: 52 MB decoded, so that a reader need not hold a whole shard."""


@dataclass(frozen=True, slots=True)
class Packed:
    """Rows of one shard."""

    input_ids_NT: NDArray[np.int32]
    document_ids_NT: NDArray[np.int64]
    """−1 at padding."""
    loss_mask_NT: NDArray[np.bool_]
    """True where the token is a target: never at a row's first token, which nothing before it predicts."""


def pack(documents: Sequence[Encoded], *, sequence_length: int, pad_token_id: int) -> Packed:
    """Pack documents, one after another, into rows of `sequence_length` tokens."""
    lengths = [len(document.ids) for document in documents]
    num_tokens = sum(lengths)
    num_rows = -(-num_tokens // sequence_length)
    size = num_rows * sequence_length
    ids, owners, mask = np.full(size, pad_token_id, np.int32), np.full(size, -1, np.int64), np.zeros(size, np.bool_)
    if documents:
        ids[:num_tokens] = np.concatenate([document.ids for document in documents])
        owners[:num_tokens] = np.repeat(np.array([document.document_id for document in documents], np.int64), lengths)
        mask[:num_tokens] = np.concatenate([document.mask for document in documents])
    shape = (num_rows, sequence_length)
    mask_NT = mask.reshape(shape)
    mask_NT[:, 0] = False
    kept_N = mask_NT.any(axis=1)
    return Packed(ids.reshape(shape)[kept_N], owners.reshape(shape)[kept_N], mask_NT[kept_N])


def to_parquet(packed: Packed) -> bytes:
    """Write rows as a token shard: `digest`, `input_ids`, `document_ids`, `loss_mask`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    length = packed.input_ids_NT.shape[1]
    digests = [hashlib.sha256(row.astype("<i4").tobytes()).digest()[:16] for row in packed.input_ids_NT]
    table = pa.table(
        {
            "digest": pa.array(digests, pa.binary(16)),
            "input_ids": _fixed_lists(pa.array(packed.input_ids_NT.ravel()), length),
            "document_ids": _fixed_lists(pa.array(packed.document_ids_NT.ravel()), length),
            "loss_mask": _fixed_lists(pa.array(packed.loss_mask_NT.ravel()), length),
        }
    )
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", row_group_size=max(1, ROW_GROUP_TOKENS // length))
    return sink.getvalue()


def _fixed_lists(values: object, length: int) -> object:
    import pyarrow as pa

    return pa.FixedSizeListArray.from_arrays(values, length)
