"""Who serves a checkpoint, by rule: from its `config.json` alone, before anything is loaded.

Promises: each answer names the source that it was read in and whether it was also seen; what no rule covers is
`unknown`, never guessed. Pure and light: no torch, no vLLM; teachers and others' checkpoints are read the same way.
Does not: load anything (`Measure(runtime=VLLM(…))` does, and what it finds counts more than a rule).

The rules for vLLM follow the order in which `CompressedTensorsConfig` of 0.32 chooses a scheme for a layer, then the
kernels that `model_executor/kernels/linear/__init__.py` lists for the device; paths are relative to the package `vllm`.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, get_args

from stages.models.serving_layers import check_layers, read_layers
from stages.models.serving_rules import (
    ARCHITECTURES,
    HEAD_SIZES,
    METHODS,
    PACKAGE,
    VERSION,
    Answer,
    Device,
    Served,
    worst_of,
)

__all__ = [
    "RULES",
    "RUNTIMES",
    "Answer",
    "Runtime",
    "RuntimeChoice",
    "Served",
    "describe",
    "is_served",
    "served_by",
    "worst_of",
]

Runtime = Literal["vllm-cpu", "vllm-cuda", "transformers", "torchao"]
"""A runtime on one kind of device: transformers and torchao load a checkpoint on any that torch knows."""
RuntimeChoice = Literal["vllm", "vllm-cpu", "vllm-cuda", "transformers", "torchao"]
"""What a config may name: `vllm` is vLLM on the device that is measured, or on both kinds where none is."""
RUNTIMES: tuple[Runtime, ...] = get_args(Runtime)
RULES = f"the rules of vLLM {VERSION}"
"""Part of the `REVISION` of each stage whose results depend on them."""

_COMPRESSED = "compressed-tensors"
_DISPATCH = f"{PACKAGE}/compressed_tensors/compressed_tensors.py"
_TRANSFORMERS = "transformers 5.17, quantizers/quantizer_compressed_tensors.py"


def served_by(config: Mapping[str, Any]) -> dict[Runtime, Served]:
    """Return what is known of each runtime about a checkpoint, from its whole `config.json`."""
    return {
        "vllm-cpu": _vllm(config, "cpu"),
        "vllm-cuda": _vllm(config, "cuda"),
        "transformers": _transformers(config),
        "torchao": _torchao(config),
    }


def is_served(config: Mapping[str, Any], runtime: RuntimeChoice) -> Served:
    """Return what is known of one runtime; of `vllm` without a device the worse of its devices."""
    answers = served_by(config)
    if runtime != "vllm":
        return answers[runtime]
    found = worst_of((answers["vllm-cpu"], answers["vllm-cuda"]))
    device = "cpu" if found is answers["vllm-cpu"] else "cuda"
    return found if found.answer == "served" else replace(found, reason=f"on {device}: {found.reason}")


def describe(answers: Mapping[Runtime, Served]) -> str:
    """Return the runtimes that serve a checkpoint as a cell of a table, e.g. `vllm, transformers`."""
    served: list[str] = [name for name in RUNTIMES if answers[name].answer == "served"]
    if {"vllm-cpu", "vllm-cuda"} <= set(served):
        served = ["vllm", *(name for name in served if not name.startswith("vllm-"))]
    return ", ".join(served) or "none"


def _vllm(config: Mapping[str, Any], device: Device) -> Served:
    return worst_of((_quantization(config, device), _head_size(config, device), _architecture(config)))


def _architecture(config: Mapping[str, Any]) -> Served:
    names: tuple[str, ...] = tuple(config.get("architectures") or ())
    source = f"vLLM {VERSION}, model_executor/models/registry.py"
    if any(name in ARCHITECTURES for name in names):
        return Served("served", f"{names[0]} is an architecture of its own", source)
    shown = ", ".join(names) or "no architecture in config.json"
    return Served("unknown", f"{shown}: no architecture of its own there; its transformers backend may load it", source)


def _head_size(config: Mapping[str, Any], device: Device) -> Served:
    text = _text(config)
    heads, width = text.get("num_attention_heads"), text.get("hidden_size")
    size = text.get("head_dim") or (width // heads if heads and width else None)
    rule = HEAD_SIZES[device]
    if size is None or rule.allows(size):
        return Served("served", "the size of its attention heads", rule.source)
    return Served("refused", f"attention heads of {size} channels; {rule.text}", rule.source, seen=rule.seen)


def _quantization(config: Mapping[str, Any], device: Device) -> Served:
    quantization = config.get("quantization_config") or _text(config).get("quantization_config")
    if not quantization:
        source = f"vLLM {VERSION}, model_executor/layers/linear.py"
        return Served("served", "its weights are not quantized", source, seen=device == "cpu")
    method = quantization.get("quant_method")
    if method != _COMPRESSED:
        known = method in METHODS
        what = "no rule is written for it" if known else "no quantization method there"
        return Served("unknown" if known else "refused", f"quant_method={method!r}: {what}", f"{PACKAGE}/__init__.py")
    if (quantization.get("sparsity_config") or {}).get("targets"):
        return Served("refused", "sparsity_config: sparse compressed tensors are no longer read", _DISPATCH)
    if (quantization.get("transform_config") or {}).get("config_groups"):
        return Served("unknown", "transform_config: no rule is written for rotations at run time", _DISPATCH)
    if cache := _cache(quantization.get("kv_cache_scheme")):
        return cache
    return check_layers(read_layers(quantization), _text(config), device)


def _cache(scheme: Mapping[str, Any] | None) -> Served | None:
    """Return why a scheme for the key-value cache is refused, or None."""
    if not scheme:
        return None
    shown = f"a key-value cache of {scheme.get('num_bits')} bits, {scheme.get('type')} by {scheme.get('strategy')}"
    if scheme.get("type") != "float" or scheme.get("num_bits") != 8:
        return Served("refused", f"{shown}; only 8-bit floats are stored there", _DISPATCH)
    if scheme.get("strategy") not in ("tensor", "attn_head"):
        return Served("refused", f"{shown}; scales are for each tensor or head there", _DISPATCH)
    return None


def _transformers(config: Mapping[str, Any]) -> Served:
    quantization = config.get("quantization_config")
    if not quantization:
        return Served("served", "its weights are not quantized", "transformers 5.17, modeling_utils.py", seen=True)
    method = quantization.get("quant_method")
    if method == _COMPRESSED:
        return Served("served", "unpacked to 16 bits while it loads: no faster, no smaller", _TRANSFORMERS, seen=True)
    return Served("unknown", f"quant_method={method!r} needs a package of its own", "transformers 5.17, quantizers/")


def _torchao(config: Mapping[str, Any]) -> Served:
    quantization = config.get("quantization_config")
    source = "transformers 5.17, quantizers/quantizer_torchao.py"
    if quantization and quantization.get("quant_method") == "torchao":
        return Served("served", "it was quantized by torchao", source)
    return Served("refused", "not quantized by torchao, and its kernels read no other's weights", source)


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part that is about the language model; multimodal checkpoints nest it."""
    text: Mapping[str, Any] = config.get("text_config") or config
    return text
