"""GPTQ that fails where it cannot solve, instead of rounding to nearest under GPTQ's name.

llm-compressor 0.14 replaces the Hessian of a layer by the identity when its Cholesky factorization fails, which is
round-to-nearest, and logs a warning. A trial that did so would stand in the search under a name that is not true.

Imports llm-compressor at its top (5 s): import it only where a trial quantizes.
"""

from typing import Any

from llmcompressor.modifiers.gptq import GPTQModifier

from stages.errors import StageFailed
from stages.runtime.workarounds import rounded_to_nearest


class StrictGPTQModifier(GPTQModifier):  # type: ignore[misc]  # the base is untyped
    """llm-compressor's GPTQ, which raises where a layer fell back to round-to-nearest."""

    def on_calibration_end(self, state: Any, event: Any, **kwargs: Any) -> None:
        """Check the layers that were solved, then finish as the base does.

        Raises:
            StageFailed: the Hessian of one layer or more was not positive definite.
        """
        fallen = rounded_to_nearest(self)
        if fallen:
            shown = ", ".join(fallen[:3]) + (f" and {len(fallen) - 3} more" if len(fallen) > 3 else "")
            raise StageFailed(
                f"GPTQ could not factorize the Hessian of {shown} with dampening={self.dampening_frac}, and would "
                "round to nearest there; use more calibration_tokens or a larger dampening"
            )
        super().on_calibration_end(state, event, **kwargs)
