"""The parts of the scoring that need neither a model nor Ray; its output heads are in `models/test_heads.py`."""

import numpy as np

from stages.evaluate.scoring import DocumentSums


def test_document_sums_add_up_over_batches():
    sums = DocumentSums()
    sums.add(np.array([9, 4, 9]), {"tokens": np.ones(3), "nll": np.array([1.0, 2.0, 3.0])})
    sums.add(np.array([4]), {"tokens": np.ones(1), "nll": np.array([0.5])})
    arrays = sums.arrays()
    assert arrays["document_id"].tolist() == [4, 9]
    assert arrays["tokens"].tolist() == [2, 2]
    assert arrays["nll"].tolist() == [2.5, 4.0]
