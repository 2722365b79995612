"""What a scheme does with the layers of one model: which it quantizes, which it leaves, and why it cannot fit.

Promise: a scheme that cannot fit is found from layer shapes, before anything is quantized, and the reason names layers
and the group sizes that would fit.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from stages.quantize.schemes import CAST_BITS, FLOAT_FORMATS, Grain, Scheme

__all__ = ["LayerPlan", "OnIndivisible", "misfit", "plan_layers", "shown"]

OnIndivisible = Literal["fail", "keep"]
"""What happens where a group does not divide a layer's input width: the scheme fails, or the layer stays in 16 bits."""

NOTHING_TO_QUANTIZE = (
    "the model has no linear layers besides its head, so there is nothing to quantize but its embeddings and head, by "
    "weight_bits=16 with vocabulary_bits=8 (GPT-2's layers are Conv1D, which transformers cannot load quantized)"
)
SHOWN_LAYERS = 3
USUAL_GROUPS = (128, 64, 32, 16, 8)
"""Group sizes that a message suggests."""


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """What a scheme does with each linear layer of a model."""

    quantized: dict[str, Grain]
    """How each layer that is quantized is rounded."""
    skipped: tuple[str, ...]
    """Layers that the scheme's rules leave in 16 bits."""
    kept: tuple[str, ...]
    """Layers that stay in 16 bits since a group does not divide them."""


def plan_layers(scheme: Scheme, in_features: Mapping[str, int]) -> LayerPlan:
    """Return what a scheme does with linear layers of these input widths."""
    grains = {name: scheme.grain(name) for name in in_features}
    kept = {name for name, grain in grains.items() if grain and not _divides(grain, in_features[name])}
    return LayerPlan(
        {name: grain for name, grain in grains.items() if grain and name not in kept},
        tuple(name for name, grain in grains.items() if grain is None),
        tuple(name for name in grains if name in kept),
    )


def _divides(grain: Grain, width: int) -> bool:
    return grain.group_size is None or width % grain.group_size == 0


def misfit(scheme: Scheme, in_features: Mapping[str, int], on_indivisible: OnIndivisible = "fail") -> str | None:
    """Say why a scheme cannot fit a model, from the input widths of its linear layers; None where it fits."""
    if scheme.weight_bits == CAST_BITS:
        return None
    if not in_features:
        return NOTHING_TO_QUANTIZE
    for rule in scheme.rules:
        if not any(fnmatchcase(name, rule.layers) for name in in_features):
            example = next(iter(in_features))
            return f"the rule for {rule.layers!r} matches no linear layer; expected a glob, e.g. of {example!r}"
    plan = plan_layers(scheme, in_features)
    if not plan.quantized and not plan.kept:
        return "its rules skip every linear layer, so there is nothing to quantize"
    if plan.kept and (on_indivisible == "fail" or not plan.quantized):
        return _describe_indivisible(scheme, plan.kept, in_features)
    return None


def _describe_indivisible(scheme: Scheme, kept: Iterable[str], in_features: Mapping[str, int]) -> str:
    first: dict[int, list[str]] = {}
    for name in sorted(kept):
        grain = scheme.grain(name)
        assert grain is not None, "only a group can fail to divide a layer"
        assert grain.group_size is not None, "only a group can fail to divide a layer"
        first.setdefault(grain.group_size, []).append(name)
    group_size, names = next(iter(first.items()))
    fitting = [str(size) for size in USUAL_GROUPS if all(in_features[name] % size == 0 for name in names)]
    wanted = "on_indivisible='keep', which leaves such layers in 16 bits"
    if scheme.numbers not in FLOAT_FORMATS:
        sizes = f"group_size {', '.join(fitting)} or None" if fitting else "group_size None"
        wanted = f"{sizes} (one scale for each channel), or {wanted}"
    listed = shown([f"{name} ({in_features[name]})" for name in names])
    return f"group_size={group_size} does not divide the input width of {listed}; expected {wanted}"


def shown(names: list[str]) -> str:
    """Return the first names, and how many there are besides."""
    more = len(names) - SHOWN_LAYERS
    return ", ".join(names[:SHOWN_LAYERS]) + (f" and {more} more" if more > 0 else "")
