"""A tiny training, its snapshots in memory, and what tests read of it."""

from typing import Any

import torch

from stages.contract import Artifact
from stages.train.forward import LiveTeacher, LossSum
from stages.train.loop import Training
from stages.train.objectives import CrossEntropy, SoftTarget
from stages.train.objectives.loss import Loss
from stages.train.reader import Reader
from stages.train.recipe import AdamW, Recipe
from stages.train.windows import ShardPair, SignalsLayout
from tests.fakes import RecordingReporter
from tests.stages.tiny import tiny_llama

RECIPE = Recipe(
    optimizer=AdamW(learning_rate=3e-3),
    optimizer_steps=12,
    warmup_fraction=0.2,
    decay="cosine",
    final_fraction=0.1,
    gradient_clip=1.0,
    max_skipped_fraction=0.1,
    dtype="float32",
    seed=5,
)


RATES = ("learning_rate", "tokens_per_second", "gradient_norm")


class MemorySnapshots:
    """Keeps every snapshot, in memory."""

    def __init__(self, at: int = -1) -> None:
        self.at, self.calls, self.kept = at, 0, {}

    def due(self) -> bool:
        self.calls += 1
        return self.calls == self.at

    def keep(self, step: int, tensors: Any, facts: Any) -> None:
        self.kept[step] = ({name: tensor.detach().clone() for name, tensor in tensors.items()}, dict(facts))


def build_training(
    inputs: tuple[Artifact, Artifact],
    *,
    micro_batch: int = 4,
    recipe: Recipe = RECIPE,
    objectives: tuple[Loss, ...] = (CrossEntropy(weight=0.5), SoftTarget(weight=0.5, temperature=2.0)),
    teacher: Any = None,
    losses: LossSum | None = None,
    **options: Any,
) -> Training:
    data, signals = inputs
    pairs = zip(data.paths("tokens/*.parquet"), signals.paths("signals/*.parquet"), strict=True)
    reader = Reader(
        tuple(ShardPair(*pair) for pair in pairs),
        SignalsLayout(8, (1.0, 2.0)),
        batch_rows=4,
        micro_batch=micro_batch,
        seed=recipe.seed,
    )
    settings = {
        "model": tiny_llama(vocabulary=100, attention_dropout=0.1),  # dropout, and a head wider than the vocabulary
        "loss": losses or LossSum(objectives, 96, teacher=LiveTeacher(teacher, 96) if teacher else None),
        "reporter": RecordingReporter(),
    }
    return Training(reader=reader, recipe=recipe, **{**settings, **options})


def losses_of(points: list[tuple[int, dict[str, float]]]) -> list[tuple[int, float]]:
    return [(step, metrics["train/loss"]) for step, metrics in points]


def weights_of(training: Training) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in training.model.state_dict().items()}
