"""Cross-entropy to the dataset's own next tokens."""

from typing import TYPE_CHECKING, ClassVar, Literal

from stages.train.objectives.loss import Loss, Targets

if TYPE_CHECKING:
    from torch import Tensor


class CrossEntropy(Loss):
    """−log q(next token), in nats."""

    CURVE: ClassVar = "cross_entropy"
    kind: Literal["cross_entropy"] = "cross_entropy"

    def losses(self, targets: Targets) -> "Tensor":
        """Return the loss of each target, [N]."""
        from stages.ops.divergences import cross_entropy

        return cross_entropy(targets.logits_NV, targets.tokens_N)
