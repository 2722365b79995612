"""Forward KL to the teacher's stored distribution, softened by a temperature (Hinton et al. 2015, arXiv:1503.02531).

The gradient of KL at temperature T shrinks as 1/T²; the factor T² keeps its share of the total loss where T is varied.
"""

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from stages.contract import Config

if TYPE_CHECKING:
    from torch import Tensor

    from stages.train.reader import MicroBatch


class SoftTarget(Config):
    """T² · KL(teacher at T ‖ student at T), with all but the stored top k as one bucket, in nats."""

    CURVE: ClassVar[str] = "kl"
    kind: Literal["soft_target"] = "soft_target"
    weight: float = Field(1.0, gt=0)
    """Factor in the total loss, besides T²."""
    temperature: float = Field(2.0, gt=0)
    """T: one of those that `Teach` stored log-partitions for."""

    @property
    def scale(self) -> float:
        """Factor of the sum of `losses` in the total loss."""
        return self.weight * self.temperature**2

    def losses(self, logits_NV: "Tensor", batch: "MicroBatch", rows: slice) -> "Tensor":
        """Return KL of each token without the factor T², [N]; `rows` says which of the batch's targets these are."""
        from stages.ops.divergences import sparse_kl_divergence
        from stages.ops.targets import sparse_target

        stored = batch.signals
        assert stored is not None, "the stage checks that signals are there"
        target = sparse_target(
            stored.ids_MK[rows].long(),
            stored.log_probs_MK[rows],
            tail_log_mass_N=stored.tail_log_mass_M[rows],
            log_partition_N=stored.log_partitions_MC[rows, stored.temperatures.index(self.temperature)],
            temperature=self.temperature,
        )
        return sparse_kl_divergence(logits_NV, target, self.temperature)
