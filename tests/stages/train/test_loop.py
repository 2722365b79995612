"""The loop: one result for any micro-batch, one more time for any snapshot; what it reports and refuses."""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM, OPTConfig, OPTForCausalLM

from stages.contract import Artifact
from stages.errors import OutOfMemory, StageFailed
from stages.ops.divergences import cross_entropy
from stages.storage import Folder
from stages.train import loop, snapshots
from stages.train.objectives import CrossEntropy, ReverseKL, SoftTarget
from stages.train.objectives.loss import Loss, Needs, Targets
from stages.train.progress import Progress
from stages.train.recipe import AdamW
from tests.stages.tiny import tiny_llama
from tests.stages.train.loops import RATES, RECIPE, MemorySnapshots, build_training, losses_of, weights_of


def test_training_in_smaller_micro_batches_gives_the_same_weights(inputs: tuple[Artifact, Artifact]) -> None:
    models = []
    for micro_batch in (4, 3, 1):
        training = build_training(inputs, micro_batch=micro_batch, model=tiny_llama())
        training.run(Progress())
        models.append(weights_of(training))
    for other in models[1:]:
        for name, expected in models[0].items():
            torch.testing.assert_close(other[name], expected, rtol=1e-4, atol=1e-5)


def test_training_from_a_snapshot_ends_with_the_very_weights_and_curve(
    inputs: tuple[Artifact, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "CURVE_POINTS", 2)  # points at steps 6 and 12, the snapshot within the first
    whole = build_training(inputs)
    done = whole.run(Progress())

    memory = MemorySnapshots(at=5)
    build_training(inputs, snapshot_writer=memory).run(Progress())
    tensors, facts = memory.kept[5]
    snapshots.write(Folder.at(tmp_path), 5, tensors, facts)
    found = snapshots.newest(Folder.at(tmp_path))
    assert found is not None
    again = build_training(inputs, model=tiny_llama(vocabulary=100, seed=9, attention_dropout=0.1))
    resumed = again.run(Progress(step=found.step, **found.facts), snapshots.read(Folder.at(tmp_path), found))

    assert (resumed.step, resumed.tokens, resumed.targets) == (done.step, done.tokens, done.targets)
    assert resumed.last == done.last
    assert [point for point, _ in again.reporter.points] == [6, 12]
    assert losses_of(again.reporter.points) == losses_of(whole.reporter.points)
    expected = weights_of(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights_of(again).items())


def test_training_at_its_end_leaves_a_snapshot_from_which_nothing_is_left_to_do(
    inputs: tuple[Artifact, Artifact],
) -> None:
    memory = MemorySnapshots()
    first = build_training(inputs, snapshot_writer=memory)
    first.run(Progress())
    assert list(memory.kept) == [12]
    again = build_training(inputs, model=tiny_llama(vocabulary=100, seed=9))
    done = again.run(Progress(step=12, **memory.kept[12][1]), memory.kept[12][0])
    assert done.step == 12
    assert all(torch.equal(tensor, weights_of(first)[name]) for name, tensor in weights_of(again).items())


def test_training_minimizes_the_weighted_objective_over_the_global_batch(inputs: tuple[Artifact, Artifact]) -> None:
    """The first gradient equals that of the formula, written out over the rows of the batch at once."""
    training = build_training(inputs, micro_batch=1, model=tiny_llama(), objectives=(CrossEntropy(weight=0.5),))
    seen: list[torch.Tensor] = []
    (step,) = training.reader.steps(0, 1)
    network = training._replicated()
    for batch in step.micro_batches:
        loss, _ = training.loss.of(network, batch)
        torch.autograd.backward(loss / step.num_targets)
    seen = [parameter.grad.clone() for parameter in training.model.parameters()]

    reference = tiny_llama()
    logits = torch.cat(
        [reference(input_ids=b.input_ids_BT).logits.flatten(0, 1)[b.positions_M] for b in step.micro_batches]
    )
    targets = torch.cat([b.targets_M for b in step.micro_batches])
    (0.5 * cross_entropy(logits, targets).mean()).backward()
    for found, parameter in zip(seen, reference.parameters(), strict=True):
        torch.testing.assert_close(found, parameter.grad, rtol=1e-4, atol=1e-6)


def test_training_reports_a_curve_and_its_progress(inputs: tuple[Artifact, Artifact]) -> None:
    training = build_training(inputs)
    done = training.run(Progress())
    report = training.reporter
    assert [step for step, _ in report.points] == list(range(1, 13))
    first, last = report.points[0][1], report.points[-1][1]
    assert set(first) == {f"train/{n}" for n in ("loss", "cross_entropy", "kl", *RATES)}
    assert first["train/loss"] == pytest.approx(
        0.5 * first["train/cross_entropy"] + 0.5 * 4 * first["train/kl"], rel=1e-5
    )
    assert last["train/loss"] < first["train/loss"]
    assert report.progressed[-1] == (12, 12, "steps")
    assert done.tokens == 12 * 4 * 16


def test_training_towards_its_own_signals_has_no_divergence(inputs: tuple[Artifact, Artifact]) -> None:
    recipe = replace(RECIPE, optimizer_steps=1)
    training = build_training(inputs, model=tiny_llama(seed=1), objectives=(SoftTarget(),), recipe=recipe)
    assert training.run(Progress()).last["train/kl"] == pytest.approx(0, abs=1e-4)


def test_training_towards_a_live_teacher_lowers_the_divergence_and_leaves_the_teacher_as_it_is(
    inputs: tuple[Artifact, Artifact],
) -> None:
    teacher = tiny_llama(vocabulary=112, seed=1, attention_dropout=0.5).train()  # its head and the student's are wider
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    recipe = replace(RECIPE, optimizer_steps=60, optimizer=AdamW(learning_rate=1e-2))
    training = build_training(inputs, objectives=(ReverseKL(),), teacher=teacher, recipe=recipe)
    training.run(Progress())
    curve = [metrics["train/reverse_kl"] for _, metrics in training.reporter.points]
    assert curve[-1] < 0.5 * curve[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_training_towards_itself_as_live_teacher_has_no_divergence(inputs: tuple[Artifact, Artifact]) -> None:
    recipe = replace(RECIPE, optimizer_steps=1)
    training = build_training(
        inputs, model=tiny_llama(seed=1), teacher=tiny_llama(seed=1), objectives=(ReverseKL(),), recipe=recipe
    )
    assert training.run(Progress()).last["train/reverse_kl"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("micro_batch", [4, 1])
def test_first_gradient_of_reverse_kl_is_that_of_the_formula_whatever_the_micro_batch(
    inputs: tuple[Artifact, Artifact], micro_batch: int
) -> None:
    teacher, student, reference = tiny_llama(seed=1), tiny_llama(), tiny_llama()
    training = build_training(
        inputs, model=student, teacher=teacher, objectives=(ReverseKL(temperature=2.0),), micro_batch=micro_batch
    )
    (step,) = training.reader.steps(0, 1)
    for batch in step.micro_batches:
        torch.autograd.backward(training.loss.of(student, batch)[0])
        logits, wanted = (
            model(input_ids=batch.input_ids_BT).logits.flatten(0, 1)[batch.positions_M] / 2
            for model in (reference, teacher)
        )
        log_q, log_p = logits.log_softmax(-1), wanted.log_softmax(-1)
        (4 * (log_q.exp() * (log_q - log_p)).sum()).backward(inputs=list(reference.parameters()))
    for found, parameter in zip(student.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(found.grad, parameter.grad, rtol=1e-3, atol=1e-4)


def _opt() -> Any:
    shape = {"hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "dropout": 0.0}
    config = OPTConfig(vocab_size=112, word_embed_proj_dim=16, max_position_embeddings=16, init_std=1.0, **shape)
    return OPTForCausalLM(config)


def _mamba() -> Any:
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    return MambaForCausalLM(MambaConfig(vocab_size=112, initializer_range=1.0, **shape)).to(torch.bfloat16)


@pytest.mark.parametrize("hidden_states", [False, True])
@pytest.mark.parametrize("build", [_opt, _mamba], ids=["head replayed", "whole logits"])
def test_objectives_see_the_live_teachers_own_logits_and_hidden_states_at_their_targets(
    inputs: tuple[Artifact, Artifact], build: Callable[[], Any], hidden_states: bool
) -> None:
    seen: list[Targets] = []

    class Spy(ReverseKL):
        NEEDS = Needs(teacher=True, hidden_states=hidden_states)

        def losses(self, targets: Targets) -> torch.Tensor:
            seen.append(targets)
            return super().losses(targets)

    torch.manual_seed(0)
    teacher = build().eval()
    training = build_training(inputs, objectives=(Spy(),), teacher=teacher)
    (step,) = training.reader.steps(0, 1)
    (batch,) = step.micro_batches
    torch.autograd.backward(training.loss.of(training.model, batch)[0])
    with torch.inference_mode():
        own = teacher(input_ids=batch.input_ids_BT, use_cache=False, output_hidden_states=True)
    (targets,) = seen
    logits_NV = own.logits.flatten(0, 1)[batch.positions_M, :96].float()
    assert targets.teacher_logits_NV is not None
    assert targets.teacher_logits_NV.dtype == torch.float32
    torch.testing.assert_close(targets.teacher_logits_NV, logits_NV, rtol=1e-5, atol=1e-5)
    found = targets.teacher_hidden_states_ND
    assert (found is not None) == hidden_states
    for state_ND, own_BTD in zip(found or (), own.hidden_states if hidden_states else (), strict=True):
        assert torch.equal(state_ND, own_BTD.flatten(0, 1)[batch.positions_M].float())


def test_live_teacher_makes_no_logits_of_a_whole_micro_batch(inputs: tuple[Artifact, Artifact]) -> None:
    teacher = tiny_llama(vocabulary=112, seed=1)
    rows: list[int] = []
    teacher.lm_head.register_forward_hook(lambda _, __, logits: rows.append(logits.shape[0]))
    training = build_training(inputs, objectives=(ReverseKL(),), teacher=teacher)
    training.run(Progress())
    assert max(rows) <= 2  # the observation of its head, and of segments in two rows; a micro-batch has four


class _HiddenMatch(Loss):
    """Squared distance of the last hidden states, as a user's own objective would have it."""

    CURVE = "hidden"
    NEEDS = Needs(teacher=True, hidden_states=True)

    def losses(self, targets: Targets) -> torch.Tensor:
        assert targets.hidden_states_ND is not None
        assert targets.teacher_hidden_states_ND is not None
        assert len(targets.hidden_states_ND) == len(targets.teacher_hidden_states_ND) == 3
        return (targets.hidden_states_ND[-1] - targets.teacher_hidden_states_ND[-1]).square().mean(-1)


def test_training_by_an_objective_on_hidden_states_learns_them(inputs: tuple[Artifact, Artifact]) -> None:
    recipe = replace(RECIPE, optimizer_steps=40, optimizer=AdamW(learning_rate=1e-2))
    options = {"objectives": (_HiddenMatch(),), "teacher": tiny_llama(seed=1), "recipe": recipe}
    training = build_training(inputs, model=tiny_llama(), **options)
    training.run(Progress())
    curve = [metrics["train/hidden"] for _, metrics in training.reporter.points]
    assert curve[-1] < 0.5 * curve[0]


def test_objectives_see_only_what_they_need(inputs: tuple[Artifact, Artifact]) -> None:
    seen: list[Targets] = []

    class Spy(CrossEntropy):
        def losses(self, targets: Targets) -> torch.Tensor:
            seen.append(targets)
            return super().losses(targets)

    build_training(inputs, objectives=(Spy(),), recipe=replace(RECIPE, optimizer_steps=1)).run(Progress())
    assert seen
    assert all(
        each.teacher_logits_NV is each.hidden_states_ND is each.teacher_hidden_states_ND is None for each in seen
    )
    assert {each.logits_NV.shape[1] for each in seen} == {96}


def test_training_with_a_broken_model_fails_naming_the_step(inputs: tuple[Artifact, Artifact]) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    memory = MemorySnapshots(at=1)
    with pytest.raises(
        StageFailed, match=r"the loss is nan .* at optimizer step 1, .* 2 such steps .* learning_rate \(now 0.003"
    ):
        build_training(inputs, model=model, snapshot_writer=memory).run(Progress())
    assert memory.kept == {}


def test_training_that_the_host_has_no_memory_for_names_step_and_micro_batch(inputs: tuple[Artifact, Artifact]) -> None:
    model = tiny_llama(vocabulary=100)

    def refuse(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    model.model.norm.register_forward_pre_hook(refuse)
    with pytest.raises(OutOfMemory, match=r"training at step 0 .*; set resources.micro_batch below 2") as caught:
        build_training(inputs, model=model, micro_batch=2).run(Progress())
    assert caught.value.micro_batch == 2


def test_learning_rate_rises_then_falls_along_a_cosine() -> None:
    rates = [3 * RECIPE.rate_fraction_at(step) for step in range(12)]
    assert rates[:4] == pytest.approx([1, 2, 3, 3])
    assert all(a > b for a, b in pairwise(rates[3:]))
    assert rates[-1] == pytest.approx(0.3)
    assert rates[7] == pytest.approx(3 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 4 / 8))))


def test_learning_rate_rises_then_falls_along_a_line_whose_last_step_still_learns() -> None:
    recipe = replace(RECIPE, decay="linear", final_fraction=0.0)
    rates = [9 * recipe.rate_fraction_at(step) for step in range(12)]
    assert rates == pytest.approx([3, 6, 9, 9, 8, 7, 6, 5, 4, 3, 2, 1])
