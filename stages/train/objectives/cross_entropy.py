"""Cross-entropy to the dataset's own next tokens."""

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from stages.contract import Config

if TYPE_CHECKING:
    from torch import Tensor

    from stages.train.reader import MicroBatch


class CrossEntropy(Config):
    """−log q(next token), in nats."""

    CURVE: ClassVar[str] = "cross_entropy"
    kind: Literal["cross_entropy"] = "cross_entropy"
    weight: float = Field(1.0, gt=0)
    """Factor in the total loss."""

    @property
    def scale(self) -> float:
        """Factor of the sum of `losses` in the total loss."""
        return self.weight

    def losses(self, logits_NV: "Tensor", batch: "MicroBatch", rows: slice) -> "Tensor":
        """Return the loss of each token, [N]; `rows` says which of the batch's targets these logits belong to."""
        from stages.ops.divergences import cross_entropy

        return cross_entropy(logits_NV, batch.targets_M[rows])
