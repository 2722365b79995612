"""Held-out text while training: the same number on every rank and micro-batch, the best weights, an early end."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.contract import Artifact
from stages.errors import StageFailed
from stages.ops.divergences import cross_entropy
from stages.storage import Folder
from stages.train import snapshots
from stages.train.loop import Training
from stages.train.objectives import CrossEntropy
from stages.train.progress import Progress
from stages.train.reader import Reader
from stages.train.recipe import AdamW, Validation
from stages.train.validation import HeldOutText
from stages.train.windows import ShardPair
from tests.stages.tiny import tiny_llama, write_dataset
from tests.stages.train.loops import RECIPE, MemorySnapshots, build_training, weights_of

EAGER = replace(RECIPE, optimizer=AdamW(learning_rate=0.2), optimizer_steps=12)
"""A rate at which the loss soon rises again."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[ShardPair, ...]:
    data = write_dataset(tmp_path_factory.mktemp("held out"), seed=7)
    return tuple(ShardPair(path, None) for path in data.paths("tokens/*.parquet"))


def held_out(shards: tuple[ShardPair, ...], *, micro_batch: int = 6, **options: Any) -> HeldOutText:
    reader = Reader(shards, None, batch_rows=6, micro_batch=micro_batch, seed=0, **options)
    return HeldOutText(reader, 3, 96, "float32")


def curve(training: Training) -> dict[int, float]:
    name = "validation/cross_entropy"
    return {step: metrics[name] for step, metrics in training.reporter.points if name in metrics}


def test_held_out_loss_is_the_mean_over_its_targets_whatever_the_micro_batch(shards: tuple[ShardPair, ...]) -> None:
    model = tiny_llama(vocabulary=100, attention_dropout=0.5).train()
    device = torch.device("cpu")
    found = held_out(shards).cross_entropy(model, device)
    assert model.training
    assert held_out(shards, micro_batch=2).cross_entropy(model, device) == pytest.approx(found, rel=1e-6)
    sums, targets = 0.0, 0
    for step in held_out(shards).reader.steps(0, 3):
        (batch,) = step.micro_batches
        with torch.no_grad():
            logits = model.eval()(input_ids=batch.input_ids_BT).logits.flatten(0, 1)[batch.positions_M, :96]
        sums, targets = sums + float(cross_entropy(logits.double(), batch.targets_M).sum()), targets + step.num_targets
    assert found == pytest.approx(sums / targets, rel=1e-6)


def test_held_out_loss_is_reported_evenly_and_changes_nothing_of_the_training(
    inputs: tuple[Artifact, Artifact], shards: tuple[ShardPair, ...]
) -> None:
    plain = build_training(inputs)
    plain.run(Progress())
    training = build_training(inputs, held_out=held_out(shards), validation=Validation(times=3))
    done = training.run(Progress())
    assert list(curve(training)) == [0, 4, 8, 12]
    assert done.held_out == curve(training)[12]
    assert all(torch.equal(tensor, weights_of(plain)[name]) for name, tensor in weights_of(training).items())


def test_training_that_keeps_the_best_ends_with_the_weights_of_its_lowest_held_out_loss_also_after_a_crash(
    inputs: tuple[Artifact, Artifact], shards: tuple[ShardPair, ...], tmp_path: Path
) -> None:
    options = {
        "recipe": EAGER, "validation": Validation(times=12), "keeps_best": True, "objectives": (CrossEntropy(),),
    }  # fmt: skip
    training = build_training(inputs, held_out=held_out(shards), **options)
    done = training.run(Progress())
    losses = curve(training)
    best = min(losses, key=lambda step: losses[step])
    assert (done.best_step, done.best_held_out) == (best, losses[best])
    assert 0 < best < 12
    device = torch.device("cpu")
    assert held_out(shards).cross_entropy(training.model, device) == losses[best] < losses[12]

    memory = MemorySnapshots(at=best + 1)  # the best weights are in it, and no longer the model's own
    build_training(inputs, held_out=held_out(shards), snapshot_writer=memory, **options).run(Progress())
    snapshots.write(Folder.at(tmp_path), best + 1, *memory.kept[best + 1])
    found = snapshots.newest(Folder.at(tmp_path))
    assert found is not None
    again = build_training(inputs, held_out=held_out(shards), **options)
    again.run(Progress(step=found.step, **found.facts), snapshots.read(Folder.at(tmp_path), found))
    assert all(torch.equal(tensor, weights_of(training)[name]) for name, tensor in weights_of(again).items())


def test_training_whose_held_out_loss_is_never_finite_has_no_best(
    inputs: tuple[Artifact, Artifact], shards: tuple[ShardPair, ...]
) -> None:
    class Broken(HeldOutText):
        def cross_entropy(self, model: Any, device: torch.device) -> float:
            return float("nan")

    text = Broken(held_out(shards).reader, 3, 96, "float32")
    training = build_training(inputs, held_out=text, keeps_best=True)
    with pytest.raises(StageFailed, match=r"the loss on held-out text is nan, .* set keep='last'"):
        training.run(Progress())


def test_training_without_a_new_best_for_long_enough_ends_early_and_stays_ended(
    inputs: tuple[Artifact, Artifact], shards: tuple[ShardPair, ...]
) -> None:
    memory = MemorySnapshots()
    options = {"recipe": EAGER, "validation": Validation(times=12, patience=2), "objectives": (CrossEntropy(),)}
    training = build_training(inputs, held_out=held_out(shards), snapshot_writer=memory, **options)
    done = training.run(Progress())
    assert done.is_stopped
    assert done.step == done.best_step + 2 < 12
    assert training.reporter.notes[0].startswith(f"stopped after {done.step} of 12 steps: no lower loss")
    tensors, facts = memory.kept[done.step]  # the last snapshot: nothing is left to do
    again = build_training(inputs, held_out=held_out(shards), **options)
    assert again.run(Progress(step=done.step, **facts), tensors).step == done.step
    assert all(torch.equal(tensor, weights_of(training)[name]) for name, tensor in weights_of(again).items())


def _once_infinite(model: Any, *calls: int) -> Any:
    """Have a model's gradient be infinite in some of its backward passes."""
    seen = iter(range(1000))
    model.model.norm.weight.register_hook(
        lambda gradient: torch.full_like(gradient, float("inf")) if next(seen) in calls else gradient
    )
    return model


def test_step_whose_gradient_is_not_finite_changes_nothing_and_is_counted(inputs: tuple[Artifact, Artifact]) -> None:
    training = build_training(inputs, model=_once_infinite(tiny_llama(), 11))
    done = training.run(Progress())
    assert (done.step, done.skipped, done.skipped_in_a_row) == (12, 1, 1)
    shorter = build_training(inputs, model=tiny_llama())  # the same schedule, ended by hand before the last step
    memory = MemorySnapshots(at=11)
    shorter.snapshot_writer = memory
    shorter.run(Progress())
    tensors, _ = memory.kept[11]
    for name, parameter in training.model.named_parameters():
        assert torch.equal(parameter, tensors[f"weights/{name}"]), name
    assert training.reporter.points[-1][1]["train/skipped_steps"] == 1


def test_training_with_more_skipped_steps_than_allowed_fails(inputs: tuple[Artifact, Artifact]) -> None:
    training = build_training(inputs, model=_once_infinite(tiny_llama(), 2, 6))
    with pytest.raises(
        StageFailed, match=r"norm inf at optimizer step 6, .* 2 such steps .* \(1 in a row\), .* most 1"
    ):
        training.run(Progress())


def test_training_whose_steps_are_skipped_one_after_another_fails_however_many_are_allowed(
    inputs: tuple[Artifact, Artifact],
) -> None:
    recipe = replace(RECIPE, max_skipped_fraction=1.0)
    training = build_training(inputs, model=_once_infinite(tiny_llama(), *range(1, 12)), recipe=recipe)
    with pytest.raises(StageFailed, match=r"at optimizer step 10, .* \(10 in a row\)"):
        training.run(Progress())
