"""Quantization schemes: what a trial tries, under a name that stays the same between runs.

Promises: a scheme's name is derived from its fields and tells them apart, so that it can name a folder, a receipt and
a row of the leaderboard; a scheme that cannot fit a model is found from layer shapes, before anything is quantized.
Does not: search bit widths per layer, quantize embeddings, the output head or routers.

Sources: round-to-nearest is the affine map of arXiv:1712.05877 (section 2.1) with compressed-tensors' ranges; GPTQ is
arXiv:2210.17323; SmoothQuant is arXiv:2211.10438, equation 4.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from stages.contract import Config

Observer = Literal["memoryless_minmax", "memoryless_mse", "imatrix_mse"]

OBSERVER_LABELS: Mapping[Observer, str] = {
    "memoryless_minmax": "",
    "memoryless_mse": "mse",
    "imatrix_mse": "imatrix",
}
DEFAULT_DAMPENING = 0.01
"""Fraction of the Hessian's mean diagonal that GPTQ adds to it (arXiv:2210.17323, section 3.3)."""


class Scheme(Config):
    """One way to quantize every linear layer of a model."""

    weight_bits: int = Field(ge=2, le=8)
    """Bits of each weight; integers."""
    group_size: int | None = Field(default=None, ge=8)
    """Weights of one row that share a scale; None is one scale for each output channel."""
    symmetric: bool = True
    """Ranges are symmetric around zero; otherwise each group stores a zero point as well."""
    algorithm: Literal["rtn", "gptq"] = "rtn"
    """Round to nearest, or GPTQ, which compensates each column's error in the columns after it."""
    activation_bits: Literal[8] | None = None
    """Quantize inputs of linear layers too, with one dynamic scale for each token; None leaves them as they are."""
    observer: Observer = "memoryless_minmax"
    """How a range is chosen: its extremes, the least squared error, or that weighted by the inputs' power."""
    smooth: float | None = Field(default=None, ge=0, le=1)
    """SmoothQuant's strength: how much of the activations' range moves into the weights; None does not smooth."""
    dampening: float = Field(default=DEFAULT_DAMPENING, gt=0, lt=1)
    """GPTQ: fraction of the Hessian's mean diagonal that is added to it."""

    @model_validator(mode="after")
    def _activations_need_8_bit_weights(self) -> Self:
        if self.activation_bits is not None and self.weight_bits != 8:
            raise ValueError(
                f"activation_bits=8 with weight_bits={self.weight_bits}: compressed-tensors stores such weights in 8 "
                "bits each, which saves nothing; use weight_bits=8, or activation_bits=None"
            )
        return self

    @model_validator(mode="after")
    def _smoothing_needs_activations(self) -> Self:
        if self.smooth is not None and self.activation_bits is None:
            raise ValueError(
                f"smooth={self.smooth} without activation_bits: smoothing moves the range of activations into the "
                "weights, which only helps where activations are quantized; set activation_bits=8, or smooth=None"
            )
        return self

    @model_validator(mode="after")
    def _dampening_needs_gptq(self) -> Self:
        if self.dampening != DEFAULT_DAMPENING and self.algorithm != "gptq":
            raise ValueError(
                f"dampening={self.dampening} has a meaning for algorithm='gptq' only, not {self.algorithm!r}"
            )
        return self

    @property
    def name(self) -> str:
        """The scheme's name, e.g. `int4-g64-sym-gptq`; schemes are equal exactly when their names are."""
        grain = f"g{self.group_size}" if self.group_size else "channel"
        sign = "sym" if self.symmetric else "asym"
        if self.activation_bits:
            # The channel-wise symmetric form is what every runtime calls W8A8: its name leaves those two words out.
            plain = [part for part, usual in ((grain, "channel"), (sign, "sym")) if part != usual]
            parts = [f"w{self.weight_bits}a{self.activation_bits}", f"int{self.weight_bits}", *plain, self.algorithm]
        else:
            parts = [f"int{self.weight_bits}", grain, sign, self.algorithm]
        parts.append(OBSERVER_LABELS[self.observer])
        parts.append(f"smooth{self.smooth!r}" if self.smooth is not None else "")
        parts.append(f"damp{self.dampening!r}" if self.dampening != DEFAULT_DAMPENING else "")
        return "-".join(part for part in parts if part)

    @property
    def needs_calibration(self) -> bool:
        """Whether quantizing reads calibration rows."""
        return self.algorithm == "gptq" or self.smooth is not None or self.observer == "imatrix_mse"

    def misfit(self, in_features: Mapping[str, int]) -> str | None:
        """Say why the scheme cannot fit a model, from the input widths of its linear layers; None where it fits."""
        if not in_features:
            return (
                "the model has no linear layers besides its head, so there is nothing to quantize "
                "(GPT-2's are Conv1D, which llm-compressor does not know)"
            )
        if self.group_size is None:
            return None
        wrong = {name: width for name, width in in_features.items() if width % self.group_size}
        if not wrong:
            return None
        shown = ", ".join(f"{name} ({width})" for name, width in sorted(wrong.items())[:3])
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        return (
            f"group_size={self.group_size} does not divide the input width of {shown}{more}; "
            "expected a group size that divides every one, or None (one scale for each channel)"
        )

    def recipe(self, ignore: Sequence[str]) -> list[Any]:
        """Build the llm-compressor modifiers of this scheme.

        Args:
            ignore: names of linear layers that stay as they are.
        """
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
        from llmcompressor.modifiers.quantization import QuantizationModifier
        from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

        from stages.quantize.gptq import StrictGPTQModifier

        weights = QuantizationArgs(
            num_bits=self.weight_bits,
            type="int",
            symmetric=self.symmetric,
            strategy="group" if self.group_size else "channel",
            group_size=self.group_size,
            observer=self.observer,
        )
        activations = None
        if self.activation_bits:
            activations = QuantizationArgs(
                num_bits=self.activation_bits, type="int", symmetric=True, strategy="token", dynamic=True, observer=None
            )
        group = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=activations)
        groups = {"config_groups": {"group_0": group}, "ignore": list(ignore)}
        smoothing = [] if self.smooth is None else [SmoothQuantModifier(smoothing_strength=self.smooth)]
        if self.algorithm == "gptq":
            return [*smoothing, StrictGPTQModifier(dampening_frac=self.dampening, **groups)]
        return [*smoothing, QuantizationModifier(**groups)]


DEFAULT_SCHEMES = (
    Scheme(weight_bits=8),
    Scheme(weight_bits=8, activation_bits=8),
    Scheme(weight_bits=4),
    Scheme(weight_bits=4, group_size=64),
    Scheme(weight_bits=4, group_size=64, symmetric=False),
    Scheme(weight_bits=4, group_size=64, algorithm="gptq"),
    Scheme(weight_bits=4, group_size=32, symmetric=False, algorithm="gptq"),
    Scheme(weight_bits=3, group_size=64, algorithm="gptq"),
    Scheme(weight_bits=3, group_size=32, symmetric=False, algorithm="gptq", observer="imatrix_mse"),
)
"""From the safest to the smallest, each with what it has to beat: round-to-nearest beside GPTQ, channels beside groups.

The last one's observer took 25 % off the KL of 3-bit GPTQ in a trial on a small language model (0.063 to 0.048)."""
