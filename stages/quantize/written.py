"""What a trial wrote, from the headers of its files: whether each layer is stored as its scheme says.

Promise: a layer that the library left dense, or packed otherwise, is found here by name, before anything is measured.
llm-compressor leaves a subclass of `torch.nn.Linear` dense, for one, and says nothing.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from stages.errors import StageFailed
from stages.models.checkpoints import StoredTensor, add_to_index, stored_tensors, tensors_of_file
from stages.quantize.fitting import LayerPlan, shown
from stages.quantize.job import Layers
from stages.quantize.schemes import Grain, Scheme

__all__ = ["check_written", "complete_vocabulary", "set_buffers_aside"]

PACKED_DTYPES = {"int": ("I32", "I8"), "fp8": ("F8_E4M3",), "nvfp4": ("U8",), "mxfp4": ("U8",)}
"""Safetensors' types of quantized weights: packed integers in words of 32 bits, 8-bit ones beside activations alone."""
SCALE_DTYPES = {"int": ("BF16", "F16"), "fp8": ("BF16", "F16"), "nvfp4": ("F8_E4M3",), "mxfp4": ("U8",)}
WORD_BITS = 32
"""A row of packed integers is padded to a whole word."""


def check_written(folder: Path, scheme: Scheme, plan: LayerPlan, layers: Layers) -> int:
    """Check that every layer that a scheme quantizes is stored so.

    Returns:
        The bytes of the linear layers and experts, quantized or not, scales included.

    Raises:
        StageFailed: some are not; names them.
    """
    tensors = stored_tensors(folder)
    parts: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition(".")
        parts.setdefault(layer, {})[part] = tensor
    wrong = []
    for name, grain in plan.quantized.items():
        if problem := _problem(parts.get(name, {}), scheme, grain, layers.in_features[name]):
            wrong.append(f"{name} ({problem})")
    if scheme.vocabulary_bits:
        wrong += [
            f"{name} ({weight.dtype})"
            for name in layers.vocabulary
            if (weight := parts.get(name, {}).get("weight")) and weight.dtype != "I8"
        ]
        if "weight" not in parts.get(layers.vocabulary[0], {}):
            wrong.append(f"{layers.vocabulary[0]} (no such tensor)")
    if scheme.kv_cache and not any("k_scale" in found for found in parts.values()):
        wrong.append("the cache of keys and values (no scales)")
    if wrong:
        raise StageFailed(
            f"{len(wrong)} parts are not stored as {scheme.name} says: {shown(wrong)}; llm-compressor packs plain "
            "torch.nn.Linear only: leave other layers out by a rule that skips them"
        )
    dense = (*plan.skipped, *plan.kept)
    stored = sum(tensor.size_bytes for name in (*plan.quantized, *dense) for tensor in parts.get(name, {}).values())
    return stored + 2 * layers.num_expert_weights


def _problem(parts: dict[str, StoredTensor], scheme: Scheme, grain: Grain, width: int) -> str | None:
    """Say what is wrong with a layer's tensors."""
    weight, scale = parts.get("weight_packed") or parts.get("weight"), parts.get("weight_scale")
    if weight is None:
        return "no weight of that name"
    num_rows = weight.shape[0]
    if weight.dtype not in PACKED_DTYPES[scheme.numbers]:
        return f"{weight.dtype}, {8 * weight.size_bytes // (num_rows * width)} bits a weight"
    bits_of_row = 8 * weight.size_bytes // num_rows
    if not width * grain.weight_bits <= bits_of_row < width * grain.weight_bits + WORD_BITS:
        return f"{bits_of_row / width:.2f} bits a weight"
    if scale is None or scale.dtype not in SCALE_DTYPES[scheme.numbers]:
        return f"scales in {scale.dtype}" if scale else "no scales"
    if scale.num_elements != num_rows * (width // grain.group_size if grain.group_size else 1):
        return f"{scale.num_elements} scales"
    return None


def set_buffers_aside(model: Any, layers: Layers) -> dict[str, Tensor]:
    """Take the buffers out of the embeddings and the head, and return them by name.

    llm-compressor ties the two again only where they hold the same tensors, and Gemma's embeddings have an
    `embed_scale`. The model is good for saving only, after this.
    """
    found = {}
    for name in layers.vocabulary:
        module = model.get_submodule(name)
        persistent = module.state_dict()
        for buffer in [each for each, _ in module.named_buffers(recurse=False) if each not in persistent]:
            found[f"{name}.{buffer}"] = getattr(module, buffer).detach().cpu().clone()
            delattr(module, buffer)
    return found


def complete_vocabulary(folder: Path, buffers: Mapping[str, Tensor], layers: Layers) -> None:
    """Write what plain transformers asks of a quantized vocabulary and the library leaves out.

    A tied head's scales: the library drops them as equal to the embeddings', while transformers ties `weight` alone and
    would make the scales up. Buffers that are in no other checkpoint: compressed-tensors makes them parts of the state
    where it compresses a module while loading.

    Args:
        folder: the checkpoint.
        buffers: from `set_buffers_aside`.
        layers: the model's layers.
    """
    embeddings, *head = layers.vocabulary
    tensors = stored_tensors(folder)
    source = f"{embeddings}.weight_scale"
    path = next(path for path in sorted(folder.glob("*.safetensors")) if source in tensors_of_file(path))
    found = load_file(path)
    added = {f"{name}.weight_scale": found[source].clone() for name in head if f"{name}.weight" not in tensors}
    added |= buffers
    if added:
        save_file(found | added, path, {"format": "pt"})
        add_to_index(folder, dict.fromkeys(added, path.name))
