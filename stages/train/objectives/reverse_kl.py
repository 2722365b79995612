"""Reverse KL to a live teacher: the student is penalized for tokens that the teacher finds unlikely.

MiniLLM (arXiv:2306.08543) and GKD (arXiv:2306.13649) use it where a student is too small for all of the teacher's
modes. Here it is over the dataset's own text, not over text that the student samples.
"""

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from stages.train.objectives.loss import Loss, Needs, Targets

if TYPE_CHECKING:
    from torch import Tensor


class ReverseKL(Loss):
    """T² · KL(student at T ‖ teacher at T) over the dataset's whole vocabulary, in nats; weighted besides."""

    CURVE: ClassVar = "reverse_kl"
    NEEDS: ClassVar = Needs(teacher=True)
    kind: Literal["reverse_kl"] = "reverse_kl"
    temperature: float = Field(1.0, gt=0)
    """T: softens both distributions; any, since the teacher is asked live."""

    @property
    def scale(self) -> float:
        """Factor of the sum of `losses` in the total loss."""
        return self.weight * self.temperature**2

    def losses(self, targets: Targets) -> "Tensor":
        """Return KL of each target without the factor T², [N]."""
        from stages.ops.divergences import reverse_kl_divergence

        assert targets.teacher_logits_NV is not None, "NEEDS asks for them"
        return reverse_kl_divergence(targets.logits_NV, targets.teacher_logits_NV, self.temperature)
