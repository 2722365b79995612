"""Packs encoded documents into rows of equal length.

Promise: documents follow one another without a gap; only the last row is padded, on the right. The concatenated rows
without padding are the concatenated documents, less rows that have no target, from which nothing can be learned (a
last row of one token, the middle of a long prompt). The same documents give the same rows.
Does not: mask attention between documents of one row: as usual in pretraining, the end-of-text token parts them.
"""

from collections.abc import Sequence

import numpy as np

from stages.formats.tokens import TokenRows
from stages.prepare.encoding import Encoded


def pack(documents: Sequence[Encoded], *, sequence_length: int, pad_token_id: int) -> TokenRows:
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
    mask_RT = mask.reshape(shape)
    mask_RT[:, 0] = False
    kept_R = mask_RT.any(axis=1)
    return TokenRows(ids.reshape(shape)[kept_R], owners.reshape(shape)[kept_R], mask_RT[kept_R])
