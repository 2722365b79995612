"""What a model's own build adds to the losses: padded entries that are trained down, a mixture's balance."""

from dataclasses import replace

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from stages.contract import Artifact
from stages.train.forward import LossSum
from stages.train.loop import Training
from stages.train.objectives import CrossEntropy
from stages.train.progress import Progress
from stages.train.recipe import AdamW
from tests.stages.tiny import tiny_llama
from tests.stages.train.loops import RECIPE, build_training


def padding_mass(training: Training) -> float:
    """Return the probability that a model gives to entries beyond the dataset's 96, mean over some of its text."""
    (step,) = training.reader.steps(0, 1)
    with torch.no_grad():
        logits_BTV = training.model.eval()(input_ids=step.micro_batches[0].input_ids_BT).logits
    return float(logits_BTV.softmax(-1)[..., 96:].sum(-1).mean())


@pytest.mark.parametrize("tied", [False, True])
def test_padded_entries_are_trained_down_and_the_shape_is_kept(inputs: tuple[Artifact, Artifact], tied: bool) -> None:
    recipe = replace(RECIPE, optimizer_steps=80, optimizer=AdamW(learning_rate=3e-2))
    masses = {}
    for is_padded in (False, True):
        model = tiny_llama(vocabulary=112, tie_word_embeddings=tied, initializer_range=0.1)
        with torch.no_grad():
            model.get_output_embeddings().weight[96:] *= 20  # what nobody trained may be anything
        losses = LossSum((CrossEntropy(),), 96, is_padded=is_padded)
        training = build_training(inputs, model=model, recipe=recipe, losses=losses)
        training.run(Progress())
        masses[is_padded] = padding_mass(training)
    assert model.get_output_embeddings().weight.shape == (112, 32)
    assert masses[True] < 0.03 < 0.5 < masses[False]
    assert training.reporter.points[-1][1]["train/padding"] < 0.05


def test_padding_and_cross_entropy_are_together_that_of_all_entries(inputs: tuple[Artifact, Artifact]) -> None:
    model = tiny_llama(vocabulary=112)
    training = build_training(inputs, model=model)
    ((batch,),) = (step.micro_batches for step in training.reader.steps(0, 1))
    losses = LossSum((CrossEntropy(),), 96, is_padded=True)
    assert losses.names == ["loss", "cross_entropy", "padding"]
    loss, sums = losses.of(model, batch)
    torch.autograd.backward(loss)
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    logits = model(input_ids=batch.input_ids_BT).logits.flatten(0, 1)[batch.positions_M]
    expected = torch.nn.functional.cross_entropy(logits, batch.targets_M, reduction="sum")
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(sums[0], sums[1] + sums[2])
    for gradient, parameter in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-4)


def test_mixtures_own_balance_is_part_of_the_loss_as_transformers_has_it(inputs: tuple[Artifact, Artifact]) -> None:
    config = MixtralConfig(
        vocab_size=96, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, router_aux_loss_coef=0.5, router_jitter_noise=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = MixtralForCausalLM(config)
    training = build_training(inputs, model=model)
    ((batch,),) = (step.micro_batches for step in training.reader.steps(0, 1))
    losses = LossSum((CrossEntropy(),), 96, router_weight=model.router_aux_loss_coef)
    assert losses.names == ["loss", "cross_entropy", "router_balance"]
    loss, sums = losses.of(model, batch)
    torch.autograd.backward(loss)
    router = model.model.layers[0].mlp.gate.weight
    gradient, count = router.grad.clone(), len(batch.targets_M)
    model.zero_grad()
    labels = torch.full_like(batch.input_ids_BT, -100).flatten()
    labels[batch.positions_M + 1] = batch.targets_M
    own = model(input_ids=batch.input_ids_BT, labels=labels.view_as(batch.input_ids_BT), output_router_logits=True)
    own.loss.backward()
    torch.testing.assert_close(loss / count, own.loss)
    torch.testing.assert_close(sums[2] / count, own.aux_loss)
    torch.testing.assert_close(gradient / count, router.grad, rtol=1e-4, atol=1e-6)
