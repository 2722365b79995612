"""What an objective is: what it needs, what it checks before anything runs, what it sees, and the losses it gives.

Promise: the loop, the reader and the stage use objectives through this only. What an objective needs is all that is
read, loaded and kept for it.

Shapes: N targets, V vocabulary of the dataset, D model width.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from stages.contract import Config
from stages.errors import ConfigError
from stages.formats.signals import SignalsInfo

if TYPE_CHECKING:
    from torch import Tensor

    from stages.formats.signal_shards import SignalColumn
    from stages.train.batches import StoredSignals


@dataclass(frozen=True, slots=True)
class Needs:
    """What an objective needs besides the student's logits and the dataset's own tokens."""

    signals: "tuple[SignalColumn, ...]" = ()
    """Columns of the stored signals; any of them needs the input `signals`."""
    teacher: bool = False
    """A live teacher in the same worker: the input `teacher`."""
    hidden_states: bool = False
    """Hidden states of the student, and of the live teacher where there is one."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """The inputs of `Train` that must be wired."""
        return (*(("signals",) if self.signals else ()), *(("teacher",) if self.teacher else ()))


@dataclass(frozen=True, slots=True)
class Targets:
    """Some targets of a micro-batch, and the student's and the teacher's outputs there."""

    logits_NV: "Tensor"
    """The student's, float32."""
    tokens_N: "Tensor"
    """int64: the tokens that come next."""
    signals: "StoredSignals | None" = None
    """The columns that some objective needs."""
    teacher_logits_NV: "Tensor | None" = None
    """A live teacher's, float32, without gradient, made for these targets only."""
    hidden_states_ND: "tuple[Tensor, ...] | None" = None
    """The student's, float32, as transformers gives them: the embeddings, then each layer's output, of which in most
    families the last is the one after the final norm."""
    teacher_hidden_states_ND: "tuple[Tensor, ...] | None" = None
    """A live teacher's, without gradient; its width is its own."""


class Loss(Config, ABC):
    """A loss of a student: a sum over targets of `losses`, times `scale`."""

    CURVE: ClassVar[str]
    """Name of its mean in the curves, below `train/`."""
    NEEDS: ClassVar[Needs] = Needs()

    weight: float = Field(1.0, gt=0)
    """Factor in the total loss."""

    @property
    def scale(self) -> float:
        """Factor of the sum of `losses` in the total loss."""
        return self.weight

    def check(self, sources: Mapping[str, Any]) -> None:
        """Check this objective against the stages that feed `Train`, before anything runs.

        Raises:
            ConfigError: an input that it needs is not wired, or does not fit.
        """
        for name in self.NEEDS.inputs:
            if name not in sources:
                raise ConfigError(
                    f"{type(self).__name__} learns from the input {name!r}, and none is wired; pass {name}="
                )

    def check_signals(self, signals: SignalsInfo) -> None:
        """Check this objective against the signals that are there; asked only of one that needs signals.

        Raises:
            StageFailed: they lack what it needs.
        """

    @abstractmethod
    def losses(self, targets: Targets) -> "Tensor":
        """Return the loss of each target, [N] float32."""
