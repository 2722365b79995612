"""AWQ and SmoothQuant that fail where they scale nothing, instead of rounding to nearest under another name.

llm-compressor 0.14 knows the layers of some architectures; of another one, or where widths do not fit, it skips what it
cannot scale, and says so in its log at most.

Imports llm-compressor at its top (5 s): import it only where a trial quantizes.
"""

from typing import Any

from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

from stages.errors import StageFailed
from stages.runtime.workarounds import num_scaled_by_awq, unpinned_cache


class StrictAWQModifier(AWQModifier):  # type: ignore[misc]  # the base is untyped
    """llm-compressor's AWQ, which raises where it finds no layer to scale, and runs without an accelerator."""

    def on_calibration_start(self, state: Any, event: Any, **kwargs: Any) -> None:
        """Find the layers to scale, as the base does, and check that there are some.

        Raises:
            StageFailed: llm-compressor knows none of this architecture.
        """
        unpinned_cache()
        super().on_calibration_start(state, event, **kwargs)
        if not num_scaled_by_awq(self):
            raise _nothing_to_scale("AWQ", state.model)


class StrictSmoothQuantModifier(SmoothQuantModifier):  # type: ignore[misc]  # the base is untyped
    """llm-compressor's SmoothQuant, which raises where it finds no layer to smooth."""

    def on_initialize(self, state: Any, **kwargs: Any) -> bool:
        """Find the layers to smooth, as the base does, and check that there are some.

        Raises:
            StageFailed: llm-compressor knows none of this architecture.
        """
        found = super().on_initialize(state, **kwargs)
        if not self.resolved_mappings_:
            raise _nothing_to_scale("SmoothQuant", state.model)
        return bool(found)


def _nothing_to_scale(method: str, model: Any) -> StageFailed:
    return StageFailed(
        f"llm-compressor knows no layers of {type(model).__name__} that {method} could scale, and would round to "
        "nearest under its name; use algorithm='gptq' or 'rtn', and smooth=None"
    )
