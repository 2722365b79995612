"""A document's outputs in a packed row are those that it has alone: in every family, and in every stage that runs one."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    FalconMambaConfig,
    FalconMambaForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from stages.errors import OutOfMemory
from stages.evaluate.scoring import DocumentSums, score_batches
from stages.formats.tokens import TokenRows, predicts
from stages.models.heads import observe_head
from stages.models.segments import keeps_segments_apart, row_inputs, run_rows
from stages.ops.divergences import kl_divergence
from stages.quantize.fidelity import measure_fidelity, predict
from stages.teach.capture import capture
from stages.teach.engines.local import LocalTeacher
from stages.train.batches import MicroBatch
from stages.train.forward import LiveTeacher, LossSum
from stages.train.objectives import CrossEntropy, ReverseKL
from tests.stages.models.test_heads import FAMILIES, MAMBA, SHAPE, VOCABULARY

NEOX = {key: value for key, value in SHAPE.items() if key not in ("num_key_value_heads", "head_dim")}
MORE: dict[str, Callable[[], Any]] = {
    "mamba": lambda: MambaForCausalLM(MambaConfig(**MAMBA)),
    "falcon mamba": lambda: FalconMambaForCausalLM(FalconMambaConfig(**MAMBA)),
    "gemma3 with a sliding window": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE, sliding_window=4)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SHAPE)),
    "gpt-neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**NEOX)),
    "bloom": lambda: BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=16, n_layer=1, n_head=2)),
    "lfm2's convolutions": lambda: Lfm2ForCausalLM(Lfm2Config(**SHAPE, layer_types=["conv"])),
}
ALONE = {
    "opt", "bart's decoder", "electra", "roformer", "rembert", "mamba", "falcon mamba", "bloom", "lfm2's convolutions",
}  # fmt: skip
"""Families whose segments are run as rows of their own: they know no block mask, or a state goes on through the row."""
LENGTHS = ((5, 1, 6), (9, 3), (12,))
"""Segments of the rows; the last of a row may be padding."""
PLACES_BT = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in LENGTHS])


def build(family: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return (FAMILIES[family][0] if family in FAMILIES else MORE[family])().eval()


@pytest.fixture
def ids_BT() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, PLACES_BT.shape, generator=torch.Generator().manual_seed(1))


def alone(model: Any, ids_BT: torch.Tensor) -> torch.Tensor:
    """Return the logits `[N, V]` of each segment in a forward pass of its own."""
    with torch.no_grad():
        segments = ids_BT.flatten().split([length for row in LENGTHS for length in row])
        return torch.cat([model(input_ids=ids[None], use_cache=False).logits[0] for ids in segments])


# Sums of other lengths and orders round differently: seen 4e-6 of logits up to 40.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.mark.parametrize("family", [*FAMILIES, *MORE])
def test_logits_of_a_document_in_a_packed_row_are_those_it_has_alone(family: str, ids_BT: torch.Tensor) -> None:
    model = build(family)
    whole = keeps_segments_apart(model)
    assert whole is (family not in ALONE)
    with torch.no_grad():
        found = run_rows(model, ids_BT, PLACES_BT, whole=whole)
        torch.testing.assert_close(found.values_NX, alone(model, ids_BT), **CLOSE)
        if family in ALONE:  # told the positions all the same, it mixes documents
            position_ids = {} if "mamba" in family or family == "bloom" else {"position_ids": PLACES_BT}
            mixed_NV = model(input_ids=ids_BT, use_cache=False, **position_ids).logits.flatten(0, 1)
            assert not torch.allclose(mixed_NV, found.values_NX, **CLOSE)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mamba", "bart's decoder"])
def test_every_stage_sees_each_document_of_a_packed_row_alone(family: str, ids_BT: torch.Tensor) -> None:
    model, other = build(family), build(family, seed=1)
    own_NV, other_NV = (alone(each, ids_BT)[:, :VOCABULARY] for each in (model, other))
    taught = LocalTeacher(model, vocabulary=VOCABULARY, k=6, temperatures=(1.0, 2.0)).signals(ids_BT, PLACES_BT)
    torch.testing.assert_close(taught.log_partitions_NC, capture(own_NV, 6, (1.0, 2.0)).log_partitions_NC, **CLOSE)

    mask_BT = (PLACES_BT > 0).numpy()
    owners_BT = np.cumsum((PLACES_BT == 0).numpy(), axis=1) + 100 * np.arange(len(LENGTHS))[:, None]
    rows = TokenRows(ids_BT.numpy().astype(np.int32), owners_BT, mask_BT, PLACES_BT.numpy().astype(np.int32))
    chosen_N = torch.from_numpy(predicts(mask_BT).ravel())
    log_p_MV, log_q_MV = (each_NV[chosen_N].log_softmax(-1) for each_NV in (own_NV, other_NV))
    kl = float(kl_divergence(log_p_MV, log_q_MV).mean())
    base = predict(model, rows, vocabulary_size=VOCABULARY, micro_batch=2, device="cpu")
    assert measure_fidelity(other, base, micro_batch=3, device="cpu").kl == pytest.approx(kl, rel=1e-4)

    targets_M = ids_BT.flatten().roll(-1)[chosen_N]
    nll_M = -log_p_MV.gather(1, targets_M[:, None])[:, 0]
    sums = DocumentSums()
    list(score_batches(model, observe_head(model, ids_BT, VOCABULARY), [rows], references={}, sums=sums, name="m"))
    documents = owners_BT.ravel()[chosen_N.numpy()]
    expected = [float(nll_M[torch.from_numpy(documents == each)].sum()) for each in np.unique(documents)]
    np.testing.assert_allclose(sums.arrays()["nll"], expected, rtol=1e-4)

    batch = MicroBatch(ids_BT, PLACES_BT, chosen_N.nonzero()[:, 0], targets_M, None)
    losses = LossSum((CrossEntropy(), ReverseKL()), VOCABULARY, teacher=LiveTeacher(other, VOCABULARY),
                     whole_rows=keeps_segments_apart(model))  # fmt: skip
    _, parts = losses.of(model, batch)
    assert parts[1:].tolist() == pytest.approx([float(nll_M.sum()), kl_sum(log_p_MV, log_q_MV)], rel=1e-4)


def kl_sum(log_p_MV: torch.Tensor, log_q_MV: torch.Tensor) -> float:
    return float(kl_divergence(log_p_MV, log_q_MV).sum())


@pytest.mark.parametrize("family", ["llama", "lfm2's convolutions"])
def test_gradients_and_hidden_states_of_packed_rows_are_those_of_documents_alone(
    family: str, ids_BT: torch.Tensor
) -> None:
    model = build(family)
    segments = ids_BT.flatten().split([length for row in LENGTHS for length in row])
    outputs = [model(input_ids=ids[None], use_cache=False, output_hidden_states=True) for ids in segments]
    weight = torch.randn(ids_BT.numel(), 1, generator=torch.Generator().manual_seed(2))
    (torch.cat([each.logits[0] for each in outputs]) * weight).sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    found = run_rows(model, ids_BT, PLACES_BT, whole=keeps_segments_apart(model), hidden_states=True)
    (found.values_NX * weight).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-3)
    for layer, state_ND in enumerate(found.hidden_states):
        torch.testing.assert_close(state_ND, torch.cat([each.hidden_states[layer][0] for each in outputs]), **CLOSE)


def test_segments_alone_run_with_those_of_equal_length_and_without_padding() -> None:
    model, shapes = build("mamba"), []
    model.register_forward_pre_hook(
        lambda _, __, options: shapes.append(tuple(options["input_ids"].shape)), with_kwargs=True
    )
    places_BT = torch.cat([torch.arange(24), torch.arange(2).repeat(4), torch.arange(1).repeat(4)])[None]
    with torch.no_grad():
        run_rows(model, torch.zeros_like(places_BT), places_BT, whole=False)
    assert shapes == [(4, 1), (4, 2), (1, 24)]


def test_probe_leaves_a_model_that_is_trained_in_training_mode() -> None:
    model = build("llama").train()
    assert keeps_segments_apart(model)
    assert model.training


def test_probe_that_meets_no_memory_is_an_error_not_an_answer() -> None:
    model = build("llama")

    def refuse(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    model.base_model.register_forward_pre_hook(refuse)
    with pytest.raises((OutOfMemory, torch.OutOfMemoryError)):
        keeps_segments_apart(model)


def test_row_inputs_are_whole_rows_with_positions_or_segments_without_padding(ids_BT: torch.Tensor) -> None:
    filled_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    filled_BT[1, 9:] = False  # its second segment is padding
    whole = row_inputs(ids_BT, PLACES_BT, filled_BT, whole=True, batch_rows=2)
    assert [batch["input_ids"].shape for batch in whole] == [(2, 12), (1, 12)]
    assert torch.equal(torch.cat([batch["position_ids"] for batch in whole]), PLACES_BT)
    segments = row_inputs(ids_BT, PLACES_BT, filled_BT, whole=False, batch_rows=2)
    assert [batch["input_ids"].shape for batch in segments] == [(1, 5), (1, 1), (1, 6), (1, 9), (1, 12)]
    assert [list(batch) for batch in segments] == [["input_ids"]] * 5
