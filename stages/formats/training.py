"""`training.json`: how a student was trained, beside its checkpoint in `model/`."""

from typing import ClassVar

from stages.formats.json_format import JsonFormat

__all__ = ["TrainingInfo"]


class TrainingInfo(JsonFormat):
    """`training.json`."""

    FILE: ClassVar = "training.json"

    optimizer_steps: int
    """Those that were done, skipped ones too."""
    skipped_steps: int
    """Steps whose gradient was not finite: they changed nothing."""
    kept_step: int
    """Steps after which the weights were what is kept: the last ones, or the best ones on held-out text."""
    stopped_early: bool
    """Whether there were no better weights on held-out text for long enough to end it."""
    epochs: float
    """How often each row was read."""
    tokens: int
    targets: int
    """Tokens whose prediction was learned."""
    final_loss: float
    """Mean weighted loss over the steps since the last point of the curves, nats per target."""
    final: dict[str, float]
    """The last point of each curve."""
    held_out_cross_entropy: float | None
    """Of the weights that are kept, on the calibration split, nats per target; None where it was not measured."""
    parameters: int
    seconds: float
    """Time in optimizer steps, over all attempts."""
    tokens_per_second: float
    wall_seconds: float
    """Time of the last attempt, loading and saving included."""
