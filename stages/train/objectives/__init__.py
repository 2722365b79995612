"""What a student is trained towards: one file a loss, each a sum over unmasked tokens in float32."""

from typing import Annotated

from pydantic import Field

from stages.train.objectives.cross_entropy import CrossEntropy
from stages.train.objectives.reverse_kl import ReverseKL
from stages.train.objectives.soft_target import SoftTarget

__all__ = ["CrossEntropy", "Objective", "ReverseKL", "SoftTarget"]

Objective = Annotated[CrossEntropy | SoftTarget | ReverseKL, Field(discriminator="kind")]
"""Any of them. A new loss is a file here, and its name in this union."""
