"""Which tensors each optimizer moves, what is decayed, and that a snapshot holds all of the state of both."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from stages.contract import Artifact
from stages.storage import Folder
from stages.train import snapshots
from stages.train.optimizer import build_optimizers, set_rates
from stages.train.progress import Progress
from stages.train.recipe import AdamW, Muon
from tests.stages.tiny import tiny_llama
from tests.stages.train.loops import RECIPE, MemorySnapshots, build_training, losses_of, weights_of

MUON = replace(RECIPE, optimizer=Muon(learning_rate=1e-2, rest_learning_rate=2e-3, weight_decay=0.2))
ROUTER = "mlp.gate.weight"


def groups_of(model: Any, recipe: Any) -> dict[str, tuple[str, float, float]]:
    """Return each tensor's optimizer, decay and peak rate."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [
        (names[id(parameter)], (type(optimizer).__name__, group["weight_decay"], group["peak"]))
        for optimizer in build_optimizers(model, recipe)
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]
    assert len(found) == len(dict(found)) == len(names)  # each exactly once
    return dict(found)


@pytest.mark.parametrize("tied", [False, True])
def test_muon_moves_the_matrices_of_hidden_layers_and_adamw_all_else(tied: bool) -> None:
    found = groups_of(tiny_llama(layers=1, tie_word_embeddings=tied), MUON)
    for name, group in found.items():
        if name.startswith("model.layers") and "norm" not in name:
            assert group == ("Muon", 0.2, 1e-2), name
        else:
            assert group == ("AdamW", 0.2 if name == "lm_head.weight" else 0.0, 2e-3), name
    assert ("lm_head.weight" in found) is not tied


def test_adamw_decays_matrices_but_no_vectors_and_no_embeddings() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=16, n_layer=1, n_head=2, n_positions=16))
    for name, (kind, decay, peak) in groups_of(model, RECIPE).items():
        is_matrix = any(part in name for part in ("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        assert (kind, decay, peak) == ("AdamW", 0.1 if is_matrix else 0.0, 3e-3), name


def test_muon_leaves_stacked_experts_to_adamw() -> None:
    config = MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    found = groups_of(model, MUON)
    stacked = [name for name, parameter in model.named_parameters() if parameter.dim() == 3]
    assert all(found[name] == ("AdamW", 0.2, 2e-3) for name in stacked)
    assert found["model.layers.0.self_attn.q_proj.weight"][0] == "Muon"


def test_set_rates_scales_each_groups_own_peak() -> None:
    optimizers = build_optimizers(tiny_llama(), MUON)
    set_rates(optimizers, 0.25)
    assert {group["lr"] for optimizer in optimizers for group in optimizer.param_groups} == {0.0025, 0.0005}


def test_first_step_of_muon_is_an_orthogonal_matrix_of_adamws_size(inputs: tuple[Artifact, Artifact]) -> None:
    """arXiv:2502.16982, equation 4: the update is 0.2 · √max(A, B) · rate times a matrix whose singular values are near 1."""
    recipe = replace(
        RECIPE, optimizer=Muon(learning_rate=0.1, weight_decay=0.0), optimizer_steps=1, warmup_fraction=0.0
    )
    training = build_training(inputs, recipe=recipe, model=tiny_llama())
    before = tiny_llama().state_dict()
    training.run(Progress())
    name = "model.layers.0.mlp.up_proj.weight"  # [64, 32]
    update = (before[name] - training.model.state_dict()[name]).double() / (0.1 * 0.2 * 64**0.5)
    # Five Newton-Schulz steps leave them between 0.5 and 1.5 (torch.optim.Muon); those of a noise gradient are smaller.
    assert torch.linalg.svdvals(update).median() == pytest.approx(0.95, abs=0.3)


@pytest.mark.parametrize("optimizer", [AdamW(learning_rate=3e-3), MUON.optimizer], ids=["adamw", "muon"])
def test_training_that_goes_on_from_a_snapshot_on_disk_ends_with_the_very_weights(
    inputs: tuple[Artifact, Artifact], tmp_path: Path, optimizer: Any
) -> None:
    recipe = replace(RECIPE, optimizer=optimizer)
    whole = build_training(inputs, recipe=recipe)
    whole.run(Progress())
    memory = MemorySnapshots(at=5)
    build_training(inputs, recipe=recipe, snapshot_writer=memory).run(Progress())
    tensors, facts = memory.kept[5]
    assert any(name.startswith("exp_avg_sq/") for name in tensors)
    assert any(name.startswith("momentum_buffer/") for name in tensors) == isinstance(optimizer, Muon)
    snapshots.write(Folder.at(tmp_path), 5, tensors, facts)
    found = snapshots.newest(Folder.at(tmp_path))
    assert found is not None
    again = build_training(inputs, recipe=recipe, model=tiny_llama(vocabulary=100, seed=9, attention_dropout=0.1))
    again.run(Progress(step=found.step, **found.facts), snapshots.read(Folder.at(tmp_path), found))
    expected = weights_of(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights_of(again).items())
    assert losses_of(again.reporter.points) == losses_of(whole.reporter.points)[5:]
