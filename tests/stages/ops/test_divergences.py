"""Divergences against float64 references, gradients included; how rows are cut must not matter."""

import numpy as np
import pytest
import torch

from stages.ops.divergences import (
    chunked_sum,
    cross_entropy,
    kl_divergence,
    reverse_kl_divergence,
    sparse_kl_divergence,
)
from stages.ops.targets import SparseTarget, sparse_target
from tests import references

N, V = 12, 300


def _logits(seed: int, scale: float = 3.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(N, V)) * scale


def _gradient(loss: torch.Tensor, logits: torch.Tensor) -> np.ndarray:
    return torch.autograd.grad(loss.sum(), logits)[0].double().numpy()


def _student(values: np.ndarray, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, requires_grad=True)


def _exact_target(teacher: np.ndarray, k: int, temperature: float) -> tuple[SparseTarget, np.ndarray]:
    """A target from what a Teach would store, but in float32 throughout."""
    log_p = references.log_softmax(teacher)
    ids = np.argsort(-log_p, axis=1)[:, :k].copy()
    target = sparse_target(
        torch.tensor(ids),
        torch.tensor(np.take_along_axis(log_p, ids, 1), dtype=torch.float32),
        tail_log_mass_N=torch.tensor(references.tail_log_mass(teacher, ids), dtype=torch.float32),
        log_partition_N=torch.tensor(references.log_partition(teacher, temperature), dtype=torch.float32),
        temperature=temperature,
    )
    return target, ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_equals_the_reference_with_its_gradient(dtype: torch.dtype) -> None:
    student = _student(_logits(0), dtype)
    targets = np.random.default_rng(1).integers(0, V, N)
    loss = cross_entropy(student, torch.tensor(targets))
    expected, gradient = references.cross_entropy(student.detach().double().numpy(), targets)
    np.testing.assert_allclose(loss.detach().numpy(), expected, rtol=1e-5, atol=1e-5)
    atol = 1e-6 if dtype == torch.float32 else 4e-3  # the gradient is rounded to the logits' own type
    np.testing.assert_allclose(_gradient(loss, student), gradient, atol=atol)


def test_kl_divergence_equals_the_reference_with_its_gradient() -> None:
    teacher, student = _logits(0), _student(_logits(1))
    log_p = torch.tensor(references.log_softmax(teacher), dtype=torch.float32)
    loss = kl_divergence(log_p, student.log_softmax(-1))
    expected, gradient = references.dense_kl(teacher, student.detach().double().numpy(), 1.0)
    np.testing.assert_allclose(loss.detach().numpy(), expected, rtol=1e-5)
    np.testing.assert_allclose(_gradient(loss, student), gradient, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reverse_kl_divergence_equals_the_reference_with_its_gradient(temperature: float, dtype: torch.dtype) -> None:
    teacher, student = _logits(0), _student(_logits(1), dtype)
    loss = reverse_kl_divergence(student, torch.tensor(teacher, dtype=torch.float32), temperature)
    expected, gradient = references.reverse_kl(teacher, student.detach().double().numpy(), temperature)
    np.testing.assert_allclose(loss.detach().numpy(), expected, rtol=1e-5)
    atol = 1e-5 if dtype == torch.float32 else 4e-2  # the gradient is rounded to the logits' own type
    np.testing.assert_allclose(_gradient(loss, student), gradient, atol=atol)


@pytest.mark.parametrize("ruled_out", [float("-inf"), torch.finfo(torch.float32).min, -60.0])
def test_reverse_kl_divergence_where_the_teacher_rules_entries_out_is_finite(ruled_out: float) -> None:
    teacher, student = _logits(0), _student(_logits(1))
    teacher[:, 5] = ruled_out
    loss = reverse_kl_divergence(student, torch.tensor(teacher, dtype=torch.float32), 1.0)
    expected, gradient = references.reverse_kl(teacher, student.detach().double().numpy(), 1.0)
    assert np.isfinite(expected).all()
    np.testing.assert_allclose(loss.detach().numpy(), expected, rtol=1e-5)
    np.testing.assert_allclose(_gradient(loss, student), gradient, atol=1e-5)


def test_reverse_kl_divergence_to_itself_is_zero() -> None:
    student = _student(_logits(0))
    loss = reverse_kl_divergence(student, student.detach(), 2.0)
    assert loss.abs().max() < 1e-6
    assert np.abs(_gradient(loss, student)).max() < 1e-6


def test_kl_divergence_with_a_zero_probability_adds_nothing() -> None:
    log_p = torch.tensor([[0.0, float("-inf")]])
    loss = kl_divergence(log_p, torch.tensor([[0.5, 0.5]]).log())
    assert loss.item() == pytest.approx(np.log(2))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("k", [1, 8, 64, V])
@pytest.mark.parametrize("scale", [0.5, 3.0, 8.0], ids=["flat", "medium", "peaked"])
def test_sparse_kl_divergence_equals_the_reference_with_its_gradient(temperature: float, k: int, scale: float) -> None:
    teacher, student = _logits(0, scale), _student(_logits(1, scale))
    target, ids = _exact_target(teacher, k, temperature)
    loss = sparse_kl_divergence(student, target, temperature)
    expected, gradient = references.sparse_kl(teacher, student.detach().double().numpy(), ids, temperature)
    np.testing.assert_allclose(loss.detach().numpy(), expected, rtol=2e-4, atol=2e-5)
    found = _gradient(loss, student)
    np.testing.assert_allclose(found, gradient, rtol=1e-5, atol=3e-6)
    assert abs(found.sum()) < 1e-4  # a common shift of the logits changes nothing


def test_sparse_kl_divergence_with_all_entries_kept_equals_the_dense_one() -> None:
    teacher, student = _logits(0), _student(_logits(1))
    target, _ = _exact_target(teacher, V, 2.0)
    log_p = torch.tensor(references.log_softmax(teacher / 2), dtype=torch.float32)
    dense = kl_divergence(log_p, (student / 2).log_softmax(-1))
    torch.testing.assert_close(sparse_kl_divergence(student, target, 2.0), dense, rtol=1e-5, atol=1e-5)


def test_sparse_kl_divergence_with_a_vanishing_student_tail_has_a_finite_gradient() -> None:
    teacher = _logits(0, 0.3)
    target, ids = _exact_target(teacher, 4, 1.0)
    values = np.full((N, V), -60.0)  # q_tail is near 1e-24: 1 − Σ q would be 0 in float32
    np.put_along_axis(values, ids, 5.0, axis=1)
    student = _student(values)
    loss = sparse_kl_divergence(student, target, 1.0)
    expected, gradient = references.sparse_kl(teacher, values, ids, 1.0)
    np.testing.assert_allclose(loss.detach().numpy(), expected, rtol=1e-5)
    np.testing.assert_allclose(_gradient(loss, student), gradient, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_sparse_target_from_float16_keeps_mass_and_tail(temperature: float) -> None:
    teacher = _logits(0, 6.0)
    exact, ids = _exact_target(teacher, 16, temperature)
    log_p = references.log_softmax(teacher)
    stored = sparse_target(
        torch.tensor(ids),
        torch.tensor(np.take_along_axis(log_p, ids, 1), dtype=torch.float16),
        tail_log_mass_N=torch.tensor(references.tail_log_mass(teacher, ids), dtype=torch.float32),
        log_partition_N=torch.tensor(references.log_partition(teacher, temperature), dtype=torch.float32),
        temperature=temperature,
    )
    torch.testing.assert_close(stored.probs_NK, exact.probs_NK, rtol=4e-3, atol=1e-5)
    torch.testing.assert_close(stored.probs_NK.sum(1) + stored.tail_N, torch.ones(N))
    torch.testing.assert_close(stored.tail_N, exact.tail_N, rtol=0, atol=2e-6 if temperature == 1 else 2e-3)


@pytest.mark.parametrize("chunk_tokens", [1, 3, 7, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunked_sum_with_any_chunk_equals_the_whole(chunk_tokens: int, dtype: torch.dtype) -> None:
    logits = _student(_logits(0), dtype)
    positions = torch.tensor([0, 2, 3, 5, 8, 9, 11])
    targets = torch.arange(len(positions)) * 5

    def term(chunks: tuple[torch.Tensor, ...], rows: slice) -> tuple[torch.Tensor, ...]:
        loss = cross_entropy(chunks[0], targets[rows]).sum()
        return 3 * loss, loss

    loss, sums = chunked_sum((logits,), positions, term, chunk_tokens=chunk_tokens)
    whole = cross_entropy(logits[positions], targets).sum()
    torch.testing.assert_close(loss, 3 * whole)
    torch.testing.assert_close(sums, torch.stack([3 * whole, whole]).detach())
    (expected,) = torch.autograd.grad(3 * whole / 7, logits)
    (found,) = torch.autograd.grad(loss / 7, logits)
    torch.testing.assert_close(found, expected)
    assert not found[[1, 4, 6, 7, 10]].any()  # masked tokens get no gradient


def test_chunked_sum_without_targets_is_zero_with_a_zero_gradient() -> None:
    logits = _student(_logits(0))
    loss, _ = chunked_sum((logits,), torch.tensor([], dtype=torch.long), lambda chunks, rows: (chunks[0].sum(),))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


@pytest.mark.parametrize("chunk_tokens", [2, 100])
def test_chunked_sum_of_several_values_gives_each_its_gradient(chunk_tokens: int) -> None:
    logits, states, unused = _student(_logits(0)), _student(_logits(1)[:, :5]), _student(_logits(2)[:, :3])
    fixed = torch.tensor(_logits(3)[:, :5], dtype=torch.float32)
    positions = torch.tensor([0, 2, 5, 11])

    def term(chunks: tuple[torch.Tensor, ...], rows: slice) -> tuple[torch.Tensor, ...]:
        return (chunks[0].square().sum() + (chunks[1] * chunks[3]).square().sum(),)

    loss, _ = chunked_sum((logits, states, unused, fixed), positions, term, chunk_tokens=chunk_tokens)
    found = torch.autograd.grad(2 * loss, (logits, states, unused))
    whole = logits[positions].square().sum() + (states * fixed)[positions].square().sum()
    expected = torch.autograd.grad(2 * whole, (logits, states))
    torch.testing.assert_close(loss, whole)
    torch.testing.assert_close(found[:2], expected)
    assert not found[2].any()
