"""Quantization schemes: what a trial tries, under a name that stays the same between runs.

Promises: a scheme's name is derived from its fields and differs where they differ, so that it can name a folder, a
receipt and a row of the leaderboard. What a scheme does not quantize is stored in 16 bits.
Does not: choose rules for single layers (a proposer may), quantize routers, or look at a model (`fitting.py` does).

Sources: round-to-nearest is the affine map of arXiv:1712.05877 (section 2.1) with compressed-tensors' ranges; GPTQ is
arXiv:2210.17323; AWQ is arXiv:2306.00978; SmoothQuant is arXiv:2211.10438, equation 4; MXFP4 is the OCP Microscaling
specification 1.0.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, Self

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


Numbers = Literal["int", "fp8", "nvfp4", "mxfp4"]

CAST_BITS = 16
"""Bits of a weight that is not quantized."""
MAX_INTEGER_BITS = 8


@dataclass(frozen=True, slots=True)
class FloatFormat:
    """A floating-point format of weights."""

    bits: int
    group_size: int | None
    """Weights that share a scale, which the format fixes; None is one scale for each output channel."""


FLOAT_FORMATS: Mapping[Numbers, FloatFormat] = {
    "fp8": FloatFormat(8, None),
    "nvfp4": FloatFormat(4, 16),
    "mxfp4": FloatFormat(4, 32),
}


@dataclass(frozen=True, slots=True)
class Grain:
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
    """One way to store a model in fewer bits."""

    weight_bits: int = Field(ge=2, le=CAST_BITS)
    """Bits of each weight of the linear layers: 2 to 8, or 16, which is a plain cast."""
    numbers: Numbers = "int"
    """What the bits mean: integers, FP8 (E4M3, one scale for each output channel), or four-bit floats with one scale
    for 16 weights (NVFP4) or 32 (MXFP4)."""
    group_size: int | None = Field(default=None, ge=8)
    """Weights of one row that share a scale, of integers; None is one scale for each output channel."""
    symmetric: bool = True
    """Ranges are symmetric around zero; otherwise each group stores a zero point as well."""
    algorithm: Literal["rtn", "gptq", "awq"] = "rtn"
    """Round to nearest; GPTQ, which compensates each column's error in the columns after it; or AWQ, which scales the
    channels that matter before it rounds to nearest."""
    activation_bits: Literal[4, 8] | None = None
    """Quantize inputs of linear layers too, to the same kind of numbers, with dynamic scales (of each token; of each
    group for four-bit floats); None leaves them as they are."""
    observer: Observer = "memoryless_minmax"
    """How a range is chosen: its extremes, the least squared error, or that weighted by the inputs' power."""
    smooth: float | None = Field(default=None, ge=0, le=1)
    """SmoothQuant's strength: how much of the activations' range moves into the weights; None does not smooth."""
    dampening: float = Field(default=DEFAULT_DAMPENING, gt=0, lt=1)
    """GPTQ: fraction of the Hessian's mean diagonal that is added to it."""
    vocabulary_bits: Literal[8] | None = None
    """Bits of the token embeddings and of the output head, integers with one scale for each token; a tied table stays
    one table. None leaves them in 16 bits. Not 4: transformers does not load a packed embedding."""
    kv_cache: Literal["fp8"] | None = None
    """How keys and values are cached: FP8 with one calibrated scale for each layer; None is the model's own type."""
    rules: tuple[LayerRule, ...] = ()
    """What is done otherwise with some layers; of the rules that match a layer, the first counts."""

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        for problem in (*self._problems_of_bits(), *self._problems_of_parts()):
            raise ValueError(problem)
        return self

    def _problems_of_bits(self) -> Iterator[str]:
        layout = FLOAT_FORMATS.get(self.numbers)
        if layout:
            if self.weight_bits != layout.bits:
                yield f"numbers={self.numbers!r} have {layout.bits} bits; got weight_bits={self.weight_bits}"
            fixed = ("group_size", "symmetric", "algorithm", "observer")
            changed = [name for name in fixed if getattr(self, name) != type(self).model_fields[name].default]
            if changed or any(not rule.skip for rule in self.rules):
                shown = ", ".join(f"{name}={getattr(self, name)!r}" for name in changed) or "a rule that changes layers"
                yield f"{shown} has a meaning for integers only; numbers={self.numbers!r} fix it, so leave it out"
            if self.activation_bits not in (None, layout.bits):
                yield f"activation_bits={self.activation_bits} with numbers={self.numbers!r}; expected {layout.bits}"
        elif MAX_INTEGER_BITS < self.weight_bits < CAST_BITS:
            yield f"weight_bits={self.weight_bits}; expected 2 to {MAX_INTEGER_BITS}, or {CAST_BITS}, which is a cast"
        elif self.weight_bits == CAST_BITS:
            kept = {"weight_bits", "vocabulary_bits", "kv_cache"}
            changed = sorted(self.model_dump(exclude_defaults=True).keys() - kept)
            if changed:
                yield f"weight_bits=16 is a plain cast, for which {', '.join(changed)} has no meaning; leave it out"
        elif self.activation_bits is not None:
            bits = min([self.weight_bits, *(rule.weight_bits for rule in self.rules if rule.weight_bits)])
            if self.activation_bits != MAX_INTEGER_BITS or bits != MAX_INTEGER_BITS:
                yield (
                    f"activation_bits={self.activation_bits} with weight_bits={bits}: compressed-tensors stores such "
                    "weights in 8 bits each, which saves nothing; use 8 for both, or activation_bits=None"
                )

    def _problems_of_parts(self) -> Iterator[str]:
        # An earlier rule may repeat the scheme's settings: it excepts layers from the rules after it.
        usual = self.usual_grain
        if self.rules and self._grain_of(self.rules[-1]) == usual:
            yield (
                f"the last rule, for {self.rules[-1].layers!r}, changes nothing: weight_bits={usual.weight_bits} and "
                f"group_size={usual.group_size} are the scheme's own, and the same trial would have another name; "
                "leave the rule out, or change it"
            )
        if self.smooth is not None and self.activation_bits is None:
            yield (
                f"smooth={self.smooth} without activation_bits: smoothing moves the range of activations into the "
                "weights, which only helps where activations are quantized; set activation_bits=8, or smooth=None"
            )
        if self.dampening != DEFAULT_DAMPENING and self.algorithm != "gptq":
            yield f"dampening={self.dampening} has a meaning for algorithm='gptq' only, not {self.algorithm!r}"

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
        parts = [*self._number_parts(), OBSERVER_LABELS[self.observer]]
        parts.append(f"smooth{self.smooth!r}" if self.smooth is not None else "")
        parts.append(f"damp{self.dampening!r}" if self.dampening != DEFAULT_DAMPENING else "")
        parts.append(f"vocab{self.vocabulary_bits}" if self.vocabulary_bits else "")
        parts.append(f"kv{self.kv_cache}" if self.kv_cache else "")
        return [part for part in parts if part]

    def _number_parts(self) -> list[str]:
        if self.weight_bits == CAST_BITS:
            return ["16bit"]
        if self.numbers != "int":  # as runtimes call them: FP8 W8A8 with dynamic scales, NVFP4 and NVFP4A16
            if self.activation_bits is None:
                return [f"{self.numbers}a16"]
            return [self.numbers, *(["dynamic"] if self.numbers == "fp8" else [])]
        grain = f"g{self.group_size}" if self.group_size else "channel"
        sign = "sym" if self.symmetric else "asym"
        if self.activation_bits:
            # The channel-wise symmetric form is what every runtime calls W8A8: its name leaves those two parts out.
            plain = [part for part, usual in ((grain, "channel"), (sign, "sym")) if part != usual]
            return [f"w{self.weight_bits}a{self.activation_bits}", f"int{self.weight_bits}", *plain, self.algorithm]
        return [f"int{self.weight_bits}", grain, sign, self.algorithm]

    @property
    def needs_calibration(self) -> bool:
        """Whether quantizing reads calibration rows."""
        static = self.numbers == "nvfp4" and self.activation_bits  # the scale over a tensor's scales
        reads = self.algorithm != "rtn" or self.smooth is not None or self.observer == "imatrix_mse"
        return bool(reads or static or self.kv_cache)

    @property
    def usual_grain(self) -> Grain:
        """How layers without a rule are rounded."""
        layout = FLOAT_FORMATS.get(self.numbers)
        return Grain(self.weight_bits, layout.group_size if layout else self.group_size)

    def grain(self, layer: str) -> Grain | None:
        """Return how a layer's weights are rounded; None where they stay as they are."""
        if self.weight_bits == CAST_BITS:
            return None
        rule = next((rule for rule in self.rules if fnmatchcase(layer, rule.layers)), None)
        return self.usual_grain if rule is None else self._grain_of(rule)

    def _grain_of(self, rule: LayerRule) -> Grain | None:
        if rule.skip:
            return None
        group_size = self.usual_grain.group_size if rule.group_size is None else rule.group_size
        return Grain(rule.weight_bits or self.weight_bits, None if group_size == "channel" else group_size)


CAST = Scheme(weight_bits=CAST_BITS)
"""What every other scheme has to beat; part of every search."""
DEFAULT_SCHEMES = (
    Scheme(weight_bits=8),
    Scheme(weight_bits=8, vocabulary_bits=8),
    Scheme(weight_bits=8, numbers="fp8", activation_bits=8),
    Scheme(weight_bits=8, activation_bits=8, smooth=0.8),
    Scheme(weight_bits=4, group_size=128, algorithm="gptq", observer="imatrix_mse"),
    Scheme(weight_bits=4, group_size=128, algorithm="gptq", observer="imatrix_mse", vocabulary_bits=8),
    Scheme(weight_bits=4, group_size=128, algorithm="awq"),
    Scheme(weight_bits=4, group_size=32, symmetric=False, algorithm="gptq", observer="imatrix_mse"),
    Scheme(weight_bits=4, numbers="nvfp4"),
    Scheme(weight_bits=4, numbers="nvfp4", activation_bits=4),
    Scheme(weight_bits=4, numbers="mxfp4", activation_bits=4),
    Scheme(weight_bits=3, group_size=64, algorithm="gptq", observer="imatrix_mse"),
)
"""From the safest to the smallest, beside the plain 16-bit cast.

The observer that weights errors by the inputs' power took 25 % off the KL of 3-bit GPTQ in a trial on a small language
model (0.063 to 0.048), and 11 % at 4 bits."""
