"""Forward KL to the teacher's stored distribution, softened by a temperature (Hinton et al. 2015, arXiv:1503.02531).

The gradient of KL at temperature T shrinks as 1/T²; the factor T² keeps its share of the total loss where T is varied.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from stages.errors import ConfigError, StageFailed
from stages.formats.signals import SignalsInfo
from stages.train.objectives.loss import Loss, Needs, Targets

if TYPE_CHECKING:
    from torch import Tensor


class SoftTarget(Loss):
    """T² · KL(teacher at T ‖ student at T), with all but the stored top k as one bucket, in nats; weighted besides."""

    CURVE: ClassVar = "kl"
    NEEDS: ClassVar = Needs(signals=("ids", "log_probs", "tail_log_mass", "log_partitions"))
    kind: Literal["soft_target"] = "soft_target"
    temperature: float = Field(2.0, gt=0)
    """T: one of those that `Teach` stored log-partitions for."""

    @property
    def scale(self) -> float:
        """Factor of the sum of `losses` in the total loss."""
        return self.weight * self.temperature**2

    def check(self, sources: Mapping[str, Any]) -> None:
        """Check that signals are wired, and made for this temperature."""
        super().check(sources)
        # The source is a Teach, whose class no other stage may import; `check_signals` checks what has no method.
        method = getattr(sources["signals"], "method", None)
        if method is not None and (wrong := self._misfit(method.temperatures)):
            raise ConfigError(wrong)

    def check_signals(self, signals: SignalsInfo) -> None:
        """Check that the signals were made for this temperature."""
        if wrong := self._misfit(signals.temperatures):
            raise StageFailed(wrong)

    def _misfit(self, temperatures: tuple[float, ...]) -> str | None:
        if self.temperature in temperatures:
            return None
        return (
            f"SoftTarget.temperature is {self.temperature:g}, expected one that the signals were made for: "
            f"{', '.join(f'{t:g}' for t in temperatures)}; change it, or add it to Teach.method.temperatures"
        )

    def losses(self, targets: Targets) -> "Tensor":
        """Return KL of each target without the factor T², [N]."""
        from stages.ops.divergences import sparse_kl_divergence
        from stages.ops.targets import sparse_target

        stored = targets.signals
        assert stored is not None, "NEEDS asks for them"
        target = sparse_target(
            stored.ids_MK.long(),
            stored.log_probs_MK,
            tail_log_mass_N=stored.tail_log_mass_M,
            log_partition_N=stored.log_partitions_MC[:, stored.temperatures.index(self.temperature)],
            temperature=self.temperature,
        )
        return sparse_kl_divergence(targets.logits_NV, target, self.temperature)
