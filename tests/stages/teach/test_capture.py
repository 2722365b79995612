"""`capture` against float64: top-k, tails down to 1e-12, log-partitions at any temperature."""

import numpy as np
import pytest
import torch

from stages.teach.capture import BLOCK, capture, chunk_rows, join, top_k
from tests import references


@pytest.mark.parametrize("vocabulary", [40, 3 * BLOCK, 20 * BLOCK, 20 * BLOCK + 17])
@pytest.mark.parametrize("k", [1, 5, 32])
def test_top_k_over_blocks_equals_the_sort(vocabulary: int, k: int) -> None:
    values = torch.tensor(np.random.default_rng(k).permuted(np.tile(np.arange(vocabulary), (9, 1)), axis=1)).float()
    found, columns = top_k(values, k)
    expected = values.sort(1, descending=True)
    assert torch.equal(found, expected.values[:, :k])
    assert torch.equal(columns, expected.indices[:, :k])


@pytest.mark.parametrize("temperatures", [(1.0, 2.0, 4.0), (4.0, 1.0), (2.0,), (3.0, 0.7, 1.0, 0.5, 8.0)])
@pytest.mark.parametrize("scale", [0.1, 3.0, 10.0], ids=["flat", "medium", "peaked"])
def test_capture_equals_the_dense_softmax(temperatures: tuple[float, ...], scale: float) -> None:
    logits = np.random.default_rng(0).normal(size=(20, 1000)).astype(np.float32) * scale
    found = capture(torch.tensor(logits), 16, temperatures)
    log_p = references.log_softmax(logits)
    ids = found.ids_NK.numpy()
    assert np.array_equal(ids, np.argsort(-log_p, axis=1, kind="stable")[:, :16])
    np.testing.assert_allclose(found.log_probs_NK.numpy(), np.take_along_axis(log_p, ids, 1), rtol=2**-11, atol=1e-4)
    np.testing.assert_allclose(
        found.tail_log_mass_N.numpy(), references.tail_log_mass(logits, ids), rtol=1e-5, atol=2e-5
    )
    for column, tau in enumerate(temperatures):
        expected = references.log_partition(logits, tau)
        np.testing.assert_allclose(found.log_partitions_NC[:, column].numpy(), expected, rtol=2e-6, atol=1e-5)
    assert bool(found.finite_N.all())


def test_capture_of_a_tiny_tail_keeps_its_relative_size() -> None:
    logits = np.full((1, 500), -30.0, np.float32)
    logits[0, :3] = (4.0, 3.0, 2.0)
    found = capture(torch.tensor(logits), 3, (1.0,))
    assert found.tail_log_mass_N.item() == pytest.approx(
        references.tail_log_mass(logits, found.ids_NK.numpy())[0], abs=1e-4
    )
    assert found.tail_log_mass_N.item() < np.log(1e-11)


def test_capture_of_the_whole_vocabulary_leaves_no_tail() -> None:
    found = capture(torch.randn(4, 10), 10, (1.0, 2.0))
    assert torch.isneginf(found.tail_log_mass_N).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_capture_of_broken_logits_tells_which_tokens(bad: float) -> None:
    logits = torch.randn(5, 200)
    logits[3, 7] = bad
    assert capture(logits, 4, (1.0,)).finite_N.tolist() == [True, True, True, False, True]


def test_capture_in_chunks_with_kept_buffers_equals_the_whole() -> None:
    logits = torch.randn(30, 400) * 4
    work = torch.full((2, 7, 400), float("nan"))
    parts = [capture(chunk, 8, (1.0, 2.0), work=work) for chunk in logits.split(7)]
    whole, joined = capture(logits, 8, (1.0, 2.0)), join(parts)
    assert torch.equal(whole.ids_NK, joined.ids_NK)
    torch.testing.assert_close(whole.log_partitions_NC, joined.log_partitions_NC)
    torch.testing.assert_close(whole.tail_log_mass_N, joined.tail_log_mass_N)


def test_chunk_rows_for_a_large_vocabulary_stays_small() -> None:
    assert chunk_rows(4096, "cpu") == 128
    assert chunk_rows(10**7, "cpu") == 8
