"""Quantization schemes: what a trial tries, under a name that stays the same between runs.

Promises: a scheme's name is derived from its fields and differs where they differ, so that it can name a folder, a
receipt and a row of the leaderboard; a scheme that cannot fit a model is found from layer shapes, before anything is
quantized.
Does not: choose rules for single layers (a proposer may), quantize embeddings, the output head or routers.

Sources: round-to-nearest is the affine map of arXiv:1712.05877 (section 2.1) with compressed-tensors' ranges; GPTQ is
arXiv:2210.17323; SmoothQuant is arXiv:2211.10438, equation 4.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
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
MAX_NAME_CHARACTERS = 60
"""Longest name of a scheme: with a base's name before it, it is a column of the leaderboard and a folder."""
DIGEST_CHARACTERS = 10
"""Of a name that its fields would make longer: 40 bits, while a search has some hundred schemes."""


@dataclass(frozen=True, slots=True)
class _Grain:
    """How fine one layer's weights are rounded."""

    weight_bits: int
    group_size: int | None


class LayerRule(Config):
    """What is done otherwise with some layers."""

    layers: str = Field(min_length=1)
    """Glob over module names, e.g. `*.down_proj` or `model.layers.0.*`. Serving runtimes that fuse layers (vLLM: the
    projections of queries, keys and values; gate and up) expect one rule for all that are fused."""
    weight_bits: int | None = Field(default=None, ge=2, le=8)
    """Bits of each weight; None is the scheme's."""
    group_size: int | Literal["channel"] | None = None
    """Weights of one row that share a scale, 8 or more; `channel` is one scale for each output channel; None is the
    scheme's."""
    skip: bool = False
    """Leave these layers as they are."""

    @model_validator(mode="after")
    def _changes_one_thing(self) -> Self:
        if isinstance(self.group_size, int) and self.group_size < 8:
            raise ValueError(f"group_size={self.group_size} for {self.layers!r}; expected 8 or more, or 'channel'")
        changes = self.weight_bits is not None or self.group_size is not None
        if changes == self.skip:
            problem = "both skips and changes" if self.skip else "neither skips nor changes"
            raise ValueError(
                f"the rule for {self.layers!r} {problem} layers; expected skip, or weight_bits, group_size"
            )
        return self


class Scheme(Config):
    """One way to quantize the linear layers of a model."""

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
    rules: tuple[LayerRule, ...] = ()
    """What is done otherwise with some layers; of the rules that match a layer, the first counts."""

    @model_validator(mode="after")
    def _activations_need_8_bit_weights(self) -> Self:
        bits = [self.weight_bits, *(rule.weight_bits for rule in self.rules if rule.weight_bits)]
        if self.activation_bits is not None and min(bits) != 8:
            raise ValueError(
                f"activation_bits=8 with weight_bits={min(bits)}: compressed-tensors stores such weights in 8 "
                "bits each, which saves nothing; use weight_bits=8, or activation_bits=None"
            )
        return self

    @model_validator(mode="after")
    def _last_rule_changes_something(self) -> Self:
        # An earlier rule may repeat the scheme's settings: it excepts layers from the rules after it.
        usual = _Grain(self.weight_bits, self.group_size)
        if self.rules and self._grain_of(self.rules[-1]) == usual:
            raise ValueError(
                f"the last rule, for {self.rules[-1].layers!r}, changes nothing: weight_bits={usual.weight_bits} and "
                f"group_size={usual.group_size} are the scheme's own, and the same trial would have another name; "
                "leave the rule out, or change it"
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
        """The scheme's name, e.g. `int4-g64-sym-gptq`; schemes are equal exactly when their names are.

        It has all that differs from the defaults where that is short; where not, or where there are rules, as much as
        fits and a digest of the fields, e.g. `int4-g64-sym-gptq-mixed-0f3a52c1d9`.
        """
        parts = [*self._name_parts(), *(["mixed"] if self.rules else [])]
        if not self.rules and len("-".join(parts)) <= MAX_NAME_CHARACTERS:
            return "-".join(parts)
        # Without defaults, so that a field that is added later does not rename every scheme.
        fields = json.dumps(self.model_dump(mode="json", exclude_defaults=True), sort_keys=True)
        digest = hashlib.sha256(fields.encode()).hexdigest()[:DIGEST_CHARACTERS]
        while len("-".join([*parts, digest])) > MAX_NAME_CHARACTERS:
            parts.pop()
        return "-".join([*parts, digest])

    def _name_parts(self) -> list[str]:
        grain = f"g{self.group_size}" if self.group_size else "channel"
        sign = "sym" if self.symmetric else "asym"
        if self.activation_bits:
            # The channel-wise symmetric form is what every runtime calls W8A8: its name leaves those two parts out.
            plain = [part for part, usual in ((grain, "channel"), (sign, "sym")) if part != usual]
            parts = [f"w{self.weight_bits}a{self.activation_bits}", f"int{self.weight_bits}", *plain, self.algorithm]
        else:
            parts = [f"int{self.weight_bits}", grain, sign, self.algorithm]
        parts.append(OBSERVER_LABELS[self.observer])
        parts.append(f"smooth{self.smooth!r}" if self.smooth is not None else "")
        parts.append(f"damp{self.dampening!r}" if self.dampening != DEFAULT_DAMPENING else "")
        return [part for part in parts if part]

    @property
    def needs_calibration(self) -> bool:
        """Whether quantizing reads calibration rows."""
        return self.algorithm == "gptq" or self.smooth is not None or self.observer == "imatrix_mse"

    def _grain(self, layer: str) -> _Grain | None:
        """Return how a layer's weights are rounded; None where they stay as they are."""
        rule = next((rule for rule in self.rules if fnmatchcase(layer, rule.layers)), None)
        return _Grain(self.weight_bits, self.group_size) if rule is None else self._grain_of(rule)

    def _grain_of(self, rule: LayerRule) -> _Grain | None:
        if rule.skip:
            return None
        group_size = self.group_size if rule.group_size is None else rule.group_size
        return _Grain(rule.weight_bits or self.weight_bits, None if group_size == "channel" else group_size)

    def quantized_layers(self, layers: Iterable[str]) -> list[str]:
        """Return those of a model's linear layers that the scheme does not skip."""
        return [name for name in layers if self._grain(name) is not None]

    def misfit(self, in_features: Mapping[str, int]) -> str | None:
        """Say why the scheme cannot fit a model, from the input widths of its linear layers; None where it fits."""
        if not in_features:
            return (
                "the model has no linear layers besides its head, so there is nothing to quantize "
                "(GPT-2's are Conv1D, which llm-compressor does not know)"
            )
        for rule in self.rules:
            if not any(fnmatchcase(name, rule.layers) for name in in_features):
                example = next(iter(in_features))
                return f"the rule for {rule.layers!r} matches no linear layer; expected a glob, e.g. of {example!r}"
        if not self.quantized_layers(in_features):
            return "its rules skip every linear layer, so there is nothing to quantize"
        wrong: dict[int, list[str]] = {}
        for name, width in sorted(in_features.items()):
            grain = self._grain(name)
            if grain is not None and grain.group_size is not None and width % grain.group_size:
                wrong.setdefault(grain.group_size, []).append(f"{name} ({width})")
        if not wrong:
            return None
        group_size, names = next(iter(wrong.items()))
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return (
            f"group_size={group_size} does not divide the input width of {', '.join(names[:3])}{more}; "
            "expected a group size that divides every one, or None (one scale for each channel)"
        )

    def recipe(self, layers: Iterable[str], ignore: Sequence[str]) -> list[Any]:
        """Build the llm-compressor modifiers of this scheme.

        Args:
            layers: names of the model's linear layers.
            ignore: names of those that stay as they are whatever the scheme.
        """
        from llmcompressor.modifiers.quantization import QuantizationModifier
        from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

        from stages.quantize.gptq import StrictGPTQModifier

        by_grain: dict[_Grain | None, list[str]] = {}
        for name in layers:
            by_grain.setdefault(self._grain(name), []).append(name)
        skipped = by_grain.pop(None, [])
        usual = _Grain(self.weight_bits, self.group_size)
        if usual in by_grain:
            by_grain[usual] = ["Linear"]  # a layer's name goes before its class, in compressed-tensors and in vLLM
        groups = {
            "config_groups": {
                f"group_{index}": self._group(grain, targets)
                for index, (grain, targets) in enumerate(by_grain.items())
                if grain is not None
            },
            "ignore": [*ignore, *skipped],
        }
        smoothing = [] if self.smooth is None else [SmoothQuantModifier(smoothing_strength=self.smooth)]
        if self.algorithm == "gptq":
            return [*smoothing, StrictGPTQModifier(dampening_frac=self.dampening, **groups)]
        return [*smoothing, QuantizationModifier(**groups)]

    def _group(self, grain: _Grain, targets: list[str]) -> Any:
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

        weights = QuantizationArgs(
            num_bits=grain.weight_bits,
            type="int",
            symmetric=self.symmetric,
            strategy="group" if grain.group_size else "channel",
            group_size=grain.group_size,
            observer=self.observer,
        )
        activations = None
        if self.activation_bits:
            activations = QuantizationArgs(
                num_bits=self.activation_bits, type="int", symmetric=True, strategy="token", dynamic=True, observer=None
            )
        return QuantizationScheme(targets=targets, weights=weights, input_activations=activations)


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
