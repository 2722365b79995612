"""llm-compressor's modifiers and compressed-tensors' layouts for a scheme.

Imports llm-compressor (5 s) where a recipe is built, not before.
"""

from typing import Any

from stages.quantize.fitting import LayerPlan
from stages.quantize.job import Layers
from stages.quantize.schemes import FLOAT_FORMATS, Grain, Scheme

__all__ = ["layer_recipe", "vocabulary_recipe"]

PRESETS = {
    ("fp8", True): "FP8_DYNAMIC",
    ("nvfp4", True): "NVFP4",
    ("nvfp4", False): "NVFP4A16",
    ("mxfp4", True): "MXFP4",
    ("mxfp4", False): "MXFP4A16",
    ("fp8", False): "FP8_DYNAMIC",  # without its input_activations
}
"""compressed-tensors' names of floating-point layouts, by the kind of numbers and whether inputs are quantized too."""


def layer_recipe(scheme: Scheme, plan: LayerPlan, layers: Layers) -> list[Any]:
    """Build the modifiers that quantize linear layers and the cache of keys and values; none for a plain cast."""
    if not plan.quantized and scheme.kv_cache is None:
        return []
    from llmcompressor.modifiers.quantization import QuantizationModifier

    from stages.quantize.gptq import StrictGPTQModifier
    from stages.quantize.scaling import StrictAWQModifier, StrictSmoothQuantModifier

    by_grain: dict[Grain, list[str]] = {}
    for name, grain in plan.quantized.items():
        by_grain.setdefault(grain, []).append(name)
    usual = scheme.usual_grain
    if usual in by_grain:
        by_grain[usual] = ["Linear"]  # a layer's name goes before its class, in compressed-tensors and in vLLM
    groups = {
        "config_groups": {
            f"group_{index}": _group(scheme, grain, targets) for index, (grain, targets) in enumerate(by_grain.items())
        },
        "ignore": [*layers.ignored, *plan.skipped, *plan.kept],
        "kv_cache_scheme": _cache_arguments() if scheme.kv_cache else None,
    }
    if scheme.algorithm == "gptq":
        modifier: Any = StrictGPTQModifier(dampening_frac=scheme.dampening, **groups)
    else:
        modifier = QuantizationModifier(**groups)
    smoothing = [] if scheme.smooth is None else [StrictSmoothQuantModifier(smoothing_strength=scheme.smooth)]
    scaling = [StrictAWQModifier()] if scheme.algorithm == "awq" else []
    return [*smoothing, *scaling, modifier]


def _group(scheme: Scheme, grain: Grain, targets: list[str]) -> Any:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, preset_name_to_scheme

    if scheme.numbers in FLOAT_FORMATS:
        found = preset_name_to_scheme(PRESETS[scheme.numbers, scheme.activation_bits is not None], targets)
        if scheme.activation_bits is None:
            found.input_activations = None
        return found
    weights = QuantizationArgs(
        num_bits=grain.weight_bits,
        type="int",
        symmetric=scheme.symmetric,
        strategy="group" if grain.group_size else "channel",
        group_size=grain.group_size,
        observer=scheme.observer,
    )
    activations = None
    if scheme.activation_bits:
        activations = QuantizationArgs(
            num_bits=scheme.activation_bits, type="int", symmetric=True, strategy="token", dynamic=True, observer=None
        )
    return QuantizationScheme(targets=targets, weights=weights, input_activations=activations)


def _cache_arguments() -> Any:
    from compressed_tensors.quantization import QuantizationArgs

    # Not the default observer, a moving average that forgets: the first of 64 batches would still weigh 53 %.
    return QuantizationArgs(num_bits=8, type="float", strategy="tensor", symmetric=True, observer="static_minmax")


def vocabulary_recipe(bits: int, layers: Layers) -> list[Any]:
    """Build the modifier that quantizes token embeddings and output head, which needs no data.

    They are stored as plain integers: transformers 5.17 initializes an embedding's `weight`, which a packed one has
    not.
    """
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.quantization import QuantizationModifier

    weights = QuantizationArgs(
        num_bits=bits, type="int", symmetric=True, strategy="channel", observer="memoryless_minmax"
    )
    scheme = QuantizationScheme(targets=list(layers.vocabulary), weights=weights, format="int-quantized")
    return [QuantizationModifier(config_groups={"vocabulary": scheme})]
