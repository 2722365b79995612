"""`training.json`: how a student was trained, beside its checkpoint in `model/`."""

from typing import ClassVar

from stages.formats.json_format import JsonFormat

__all__ = ["TrainingInfo"]


class TrainingInfo(JsonFormat):
    """`training.json`."""

    FILE: ClassVar = "training.json"

    optimizer_steps: int
    tokens: int
    targets: int
    """Tokens whose prediction was learned."""
    final_loss: float
    """Mean weighted loss over the steps since the last point of the curves, nats per target."""
    final: dict[str, float]
    """The last point of each curve."""
    parameters: int
    seconds: float
    """Time in optimizer steps, over all attempts."""
    tokens_per_second: float
    wall_seconds: float
    """Time of the last attempt, loading and saving included."""
