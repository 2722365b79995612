"""Which kernel of vLLM takes the layers of a compressed-tensors checkpoint: the rules, in vLLM's own order.

Read in 0.32 (`serving_rules.VERSION`). A layer's scheme is chosen by `CompressedTensorsConfig._get_scheme_from_parts`,
then a kernel by `model_executor/kernels/linear/__init__.py`; a scheme without a kernel on a device is refused while
the model loads: "Failed to find a kernel that can implement the WNA16 linear layer".

Pure: no torch.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from stages.models.serving_rules import PACKAGE, VERSION, Answer, Device, Served, worst_of

__all__ = ["LayerFormat", "check_layers", "read_layers"]

_DISPATCH = f"{PACKAGE}/compressed_tensors/compressed_tensors.py"
_KERNELS = f"vLLM {VERSION}, model_executor/kernels/linear"
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers that vLLM computes as one, and which must therefore be quantized alike."""
_PACKED_INTO = ("naive-quantized", "int-quantized", "float-quantized", "nvfp4-pack-quantized")
"""`is_activation_quantization_format` of `compressed_tensors/utils.py`."""


@dataclass(frozen=True, slots=True)
class Numbers:
    """How one tensor's numbers are rounded, as compressed-tensors' `QuantizationArgs` says it."""

    num_bits: int
    type: str
    strategy: str
    group_size: int | None
    symmetric: bool
    dynamic: bool
    actorder: str | None

    @classmethod
    def read(cls, values: Mapping[str, Any] | None) -> "Numbers | None":
        """Read the part of a config; None where the tensor is left as it is."""
        if not values:
            return None
        group_size = values.get("group_size")
        return cls(
            num_bits=values.get("num_bits", 8),
            type=values.get("type", "int"),
            strategy=values.get("strategy") or ("group" if group_size and group_size > 0 else "tensor"),
            group_size=group_size if group_size and group_size > 0 else None,
            symmetric=values.get("symmetric", True),
            dynamic=bool(values.get("dynamic", False)),
            actorder=values.get("actorder"),
        )

    @property
    def text(self) -> str:
        """The numbers in words, e.g. `3-bit int weights in groups of 64`."""
        grain = f"in groups of {self.group_size}" if self.group_size else f"by {self.strategy}"
        return f"{self.num_bits}-bit {self.type} {grain}{'' if self.symmetric else ', asymmetric'}"


@dataclass(frozen=True, slots=True)
class LayerFormat:
    """One group of layers: what is stored of them, and how they compute."""

    format: str
    targets: tuple[str, ...]
    weights: Numbers
    inputs: Numbers | None
    outputs: Numbers | None

    @property
    def text(self) -> str:
        """The group in words."""
        inputs = f", inputs {self.inputs.text}" if self.inputs else ""
        return f"weights {self.weights.text}{inputs} ({self.format})"

    @property
    def embeds(self) -> bool:
        """Whether it is about embeddings, which are looked up and not multiplied."""
        return any("embed" in target.lower() for target in self.targets)


def read_layers(quantization: Mapping[str, Any]) -> tuple[LayerFormat, ...]:
    """Read the groups of a checkpoint's compressed-tensors `quantization_config`; those of attention alone are not
    layers (vLLM reads the cache's scales in their place)."""
    found = []
    for group in (quantization.get("config_groups") or {}).values():
        targets, weights = tuple(group.get("targets") or ()), Numbers.read(group.get("weights"))
        if weights is None or (len(targets) == 1 and targets[0].endswith("Attention")):
            continue
        stored = group.get("format") or quantization.get("format") or "dense"
        inputs, outputs = Numbers.read(group.get("input_activations")), Numbers.read(group.get("output_activations"))
        found.append(LayerFormat(stored, targets, weights, inputs, outputs))
    return tuple(found)


def check_layers(layers: tuple[LayerFormat, ...], text: Mapping[str, Any], device: Device) -> Served:
    """Return whether vLLM has a kernel for every group on a device; the worst answer counts.

    Args:
        layers: from `read_layers`.
        text: the config of the language model, for the widths of its layers.
        device: the kind of device.
    """
    if not layers:
        return Served("served", "no layer is quantized", _DISPATCH)
    answers = [check_layer(layer, text, device) for layer in layers]
    if unlike := _unlike_fused(layers):
        answers.append(Served("refused", f"{unlike} are computed as one there, and are quantized differently", _FUSION))
    worst = worst_of(answers)
    seen = worst.seen if worst.answer == "refused" else all(found.seen for found in answers)
    return Served(worst.answer, worst.reason, worst.source, seen)


_FUSION = f"{PACKAGE}/compressed_tensors/utils.py"


def check_layer(layer: LayerFormat, text: Mapping[str, Any], device: Device) -> Served:
    """Return whether vLLM has a scheme and a kernel for one group of layers."""
    weights, inputs = layer.weights, layer.inputs
    if weights.actorder in ("group", "dynamic"):
        return Served("refused", f"actorder={weights.actorder!r}: only a static order is read", _DISPATCH)
    if layer.embeds:
        return _embedding(layer, device)
    if weights.type == "float" and weights.num_bits == 4:
        return _float4(layer, device)
    if weights.type == "float":
        return _float8(layer, device)
    if inputs is None:
        return _weight_only(layer, text, device)
    return _integers(layer, device)


def _embedding(layer: LayerFormat, device: Device) -> Served:
    source = f"{PACKAGE}/compressed_tensors/compressed_tensors_embedding.py"
    weights = layer.weights
    if weights.type != "int" or layer.inputs or weights.strategy not in ("channel", "group"):
        return Served("refused", f"embeddings: {layer.text}; expected integers by channel or group alone", source)
    if device == "cpu":
        return Served("refused", "embeddings: their lookup is a Triton kernel, which CPUs lack", source)
    if layer.format != "pack-quantized" or not weights.symmetric:
        return Served("refused", f"embeddings: {layer.text}; expected symmetric, packed into 32-bit words", source)
    return Served("served", f"embeddings: {weights.text}", source)


def _float4(layer: LayerFormat, device: Device) -> Served:
    weights = layer.weights
    nvfp4 = weights.strategy == "tensor_group" and weights.group_size == 16
    mxfp4 = weights.strategy == "group" and weights.group_size == 32
    if not weights.symmetric or not (nvfp4 or mxfp4):
        return Served("refused", f"{layer.text}: neither NVFP4 nor MXFP4", _DISPATCH)
    name = "NVFP4" if nvfp4 else "MXFP4"
    source = f"{_KERNELS}/{name.lower()}"
    if device == "cpu":
        return Served("refused", f"{name} has no kernel on CPUs", source, seen=True)
    return Served("served", f"{name}, by Marlin or native kernels (compute capability 7.5, MXFP4 8.0)", source)


def _float8(layer: LayerFormat, device: Device) -> Served:
    weights, inputs = layer.weights, layer.inputs
    source = f"{_KERNELS}/scaled_mm"
    if weights.num_bits == 8 and weights.strategy == "group" and weights.group_size == 32:
        answer: Answer = "refused" if device == "cpu" else "served"
        return Served(answer, f"MXFP8 {'has no kernel on CPUs' if device == 'cpu' else 'kernels'}", f"{_KERNELS}/mxfp8")
    known = weights.num_bits == 8 and weights.symmetric and weights.strategy in ("tensor", "channel", "block")
    if not known or layer.format not in _PACKED_INTO:
        return Served("refused", f"{layer.text}: no scheme of floating-point weights fits", _DISPATCH)
    if inputs is None:
        if device == "cpu":
            return Served(
                "refused", "8-bit float weights alone (W8A16) have no kernel on CPUs", f"{_KERNELS}/__init__.py"
            )
        return Served("served", "FP8 weights by Marlin or Humming", source)
    if not (inputs.dynamic or (inputs.symmetric and inputs.strategy == "tensor")):
        return Served("refused", f"{layer.text}: static scales are for whole tensors there", _DISPATCH)
    if device == "cuda":
        return Served("served", "FP8 kernels from compute capability 8.9, weights alone below", source)
    if weights.strategy == "block":
        return Served("unknown", "FP8 in blocks: its CPU kernels need AMX", f"{source}/cpu.py")
    by_token = weights.strategy == "channel" and inputs.dynamic and inputs.strategy == "token"
    return Served("served", "FP8 by torch's scaled matrix product", f"{source}/pytorch.py", seen=by_token)


def _weight_only(layer: LayerFormat, text: Mapping[str, Any], device: Device) -> Served:
    weights = layer.weights
    if layer.format in _PACKED_INTO:
        return Served("refused", f"{layer.text}: integers without inputs must be packed (pack-quantized)", _DISPATCH)
    if weights.strategy not in ("channel", "group") or layer.format != "pack-quantized":
        return Served("refused", f"{layer.text}: no scheme of integer weights fits", _DISPATCH)
    if device == "cpu":
        return _weight_only_on_cpu(weights, text)
    marlin = (weights.num_bits in (4, 8) if weights.symmetric else weights.num_bits == 4) and (
        weights.group_size in (None, 32, 64, 128)
    )
    kernel, least = ("marlin", "7.5") if marlin else ("humming", "7.5, its package installed")
    return Served("served", f"by {kernel} (compute capability {least})", f"{_KERNELS}/mixed_precision/{kernel}.py")


def _weight_only_on_cpu(weights: Numbers, text: Mapping[str, Any]) -> Served:
    source = f"{_KERNELS}/mixed_precision/cpu.py"
    if weights.num_bits != 4:
        return Served("refused", f"weights alone, {weights.text}; the only kernel takes 4 bits", source, seen=True)
    if weights.group_size is not None and weights.group_size % 2:
        return Served("refused", f"groups of {weights.group_size}; expected a multiple of 2", source)
    wrong = {name: width for name, width in _widths(text) if width % 32}
    if wrong:
        shown = ", ".join(f"{name}={width}" for name, width in wrong.items())
        return Served("refused", f"{shown}; the kernel takes widths that 32 divides", source)
    return Served("served", "4-bit weights by CPUWNA16", source, seen=True)


def _integers(layer: LayerFormat, device: Device) -> Served:
    """Check integer weights with quantized inputs."""
    weights, inputs = layer.weights, layer.inputs
    assert inputs is not None
    if layer.format == "pack-quantized" or layer.outputs is not None or inputs.type != "int":
        return Served("unknown", f"{layer.text}: no rule is written for it", _DISPATCH)
    if weights.num_bits == 4 and inputs.num_bits == 8 and weights.symmetric and inputs.strategy == "token":
        return Served("unknown", f"{layer.text}: its kernels depend on the processor", _DISPATCH)
    by_token = inputs.dynamic and inputs.strategy == "token"
    by_tensor = not inputs.dynamic and inputs.strategy == "tensor"
    fits = weights.num_bits == inputs.num_bits == 8 and weights.symmetric and weights.strategy in ("tensor", "channel")
    if not fits or not (by_token or by_tensor):
        return Served(
            "refused",
            f"{layer.text}; expected 8-bit weights, symmetric, by channel or tensor, with 8-bit inputs",
            _DISPATCH,
        )
    kernel = "cutlass" if device == "cuda" else "cpu"
    seen = device == "cpu" and by_token and weights.strategy == "channel"
    return Served("served", "INT8 products of weights and inputs", f"{_KERNELS}/scaled_mm/{kernel}.py", seen)


def _widths(text: Mapping[str, Any]) -> Iterable[tuple[str, int]]:
    """Return the widths of a model's linear layers that its config names."""
    names = ("hidden_size", "intermediate_size")
    yield from ((name, text[name]) for name in names if isinstance(text.get(name), int))
    heads, size = text.get("num_attention_heads"), text.get("head_dim")
    if isinstance(heads, int) and isinstance(size, int):
        yield "num_attention_heads x head_dim", heads * size


def _unlike_fused(layers: tuple[LayerFormat, ...]) -> str | None:
    """Return layers that vLLM fuses and that are in different groups, where groups name layers one by one."""
    group_of = {target: index for index, layer in enumerate(layers) for target in layer.targets if "." in target}
    usual = next((index for index, layer in enumerate(layers) if "Linear" in layer.targets), None)
    for target in group_of:
        prefix, _, name = target.rpartition(".")
        for names in _FUSED:
            if name in names and len({group_of.get(f"{prefix}.{one}", usual) for one in names}) > 1:
                return " and ".join(f"{prefix}.{one}" for one in names)
    return None
