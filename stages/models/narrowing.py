"""A model → the same architecture with fewer layers, heads and channels, with its weights where they fit.

Layers are taken evenly spaced with the first and the last (DistilBERT took every other: arXiv:1910.01108); of heads
and channels the leading ones. A head keeps its size, and query heads stay with the key-value head they shared, so that
what is copied still attends as it did. Choosing by importance is pruning's work, not this module's.

Promise: works on names that transformers' configs share (`attribute_map` gives each family's own), and on any
architecture where only layers are taken; where a tensor would have to be cut and it is not known how its axes are laid
out, it is refused, never filled with noise.
"""

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stages.errors import StageFailed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LEADING = re.compile(
    r"\.(q_proj|k_proj|v_proj|o_proj|q_norm|k_norm|gate_proj|up_proj|down_proj|c_proj|c_fc|embed_tokens|wte|wpe|"
    r"[a-z_]*layernorm|norm|ln_\w+)\.(weight|bias)$|^lm_head\.(weight|bias)$"
)
"""Tensors whose leading channels along each axis belong together: one block of heads, or plain channels."""
LAYER_INDEX = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True, slots=True)
class Size:
    """What to keep; None keeps all."""

    layers: int | None = None
    heads: int | None = None
    width: int | None = None


def evenly_spaced(total: int, kept: int) -> list[int]:
    """Return `kept` of `total` layer indexes, evenly spaced, the first and the last among them."""
    if kept == 1:
        return [0]
    return [round(i * (total - 1) / (kept - 1)) for i in range(kept)]


def _resolve(config: Any, size: Size) -> tuple[list[int], int, int]:
    """Return kept layers, heads and width, checked against the model's own."""
    total, heads, width = config.num_hidden_layers, config.num_attention_heads, config.hidden_size
    for name, wanted, most in (
        ("layers", size.layers, total),
        ("heads", size.heads, heads),
        ("width", size.width, width),
    ):
        if wanted is not None and wanted > most:
            raise StageFailed(f"Smaller.{name} is {wanted}, expected at most the origin's {most}")
    own_head_size = getattr(config, "head_dim", None) is not None
    head_size = config.head_dim if own_head_size else width // heads
    new_width = size.width or (width if own_head_size or size.heads is None else size.heads * head_size)
    if size.heads is None and new_width * heads % width:
        step = width // heads
        raise StageFailed(
            f"Smaller.width is {new_width}, which leaves no whole number of heads; "
            f"use a multiple of {step} or set heads"
        )
    new_heads = size.heads or new_width * heads // width
    if not own_head_size and new_heads * head_size != new_width:
        raise StageFailed(
            f"Smaller has width {new_width} and {new_heads} heads; in this architecture width is heads × {head_size}: "
            f"set width to {new_heads * head_size} or leave one of them out"
        )
    return evenly_spaced(total, size.layers or total), new_heads, new_width


def _kv_heads(config: Any, heads: int) -> int | None:
    """Return the key-value heads that go with fewer heads, so that groups keep their size; None where it has none."""
    kv_heads = getattr(config, "num_key_value_heads", None)
    if kv_heads is None:
        return None
    group = config.num_attention_heads // kv_heads
    if heads > group and heads % group:
        raise StageFailed(
            f"Smaller has {heads} heads, expected a multiple of {group}, the heads that share keys and values"
        )
    return max(1, int(heads // group))


def narrow_config(config: Any, size: Size) -> tuple[Any, list[int]]:
    """Return a config of the smaller model, and the layers that it keeps.

    Raises:
        StageFailed: a size is above the teacher's, or does not divide.
    """
    layers, heads, width = _resolve(config, size)
    values = copy.deepcopy(config.to_dict())
    own = getattr(config, "attribute_map", {})

    def put(name: str, value: Any) -> None:
        values[own.get(name, name)] = value

    put("num_hidden_layers", len(layers))
    put("num_attention_heads", heads)
    put("hidden_size", width)
    kv_heads = _kv_heads(config, heads)
    if kv_heads is not None:
        put("num_key_value_heads", kv_heads)
    for name in ("intermediate_size", "n_inner"):
        inner = values.get(own.get(name, name))
        if inner is not None:
            put(name, inner * width // config.hidden_size)
    for name, value in values.items():
        if isinstance(value, list) and "layer" in name and len(value) == config.num_hidden_layers:
            values[name] = [value[layer] for layer in layers]
    if isinstance(values.get("max_window_layers"), int):
        values["max_window_layers"] = min(values["max_window_layers"], len(layers))
    return type(config).from_dict(values), layers


def _source_name(name: str, layers: list[int]) -> str:
    """Return the teacher's name of a student's tensor."""
    return LAYER_INDEX.sub(lambda found: str(layers[int(found[0])]), name, count=1)


def _leading(tensor: Tensor, shape: torch.Size) -> Tensor:
    return tensor[tuple(slice(0, length) for length in shape)]


def _blocks(tensor: Tensor, shape: torch.Size, axis: int, parts: list[tuple[int, int]]) -> Tensor:
    """Cut each of several blocks along an axis, given their (old, new) lengths, and put them together again."""
    pieces, start = [], 0
    for old, new in parts:
        wanted = torch.Size([new if i == axis % len(shape) else length for i, length in enumerate(shape)])
        pieces.append(_leading(tensor.narrow(axis, start, old), wanted))
        start += old
    return torch.cat(pieces, axis)


def _cutter(name: str, old: Any, new: Any) -> Callable[[Tensor, torch.Size], Tensor] | None:
    """Return how to cut the tensor of a name; None where its layout is not known."""
    if LEADING.search(name):
        return _leading
    if re.search(r"\.c_attn\.(weight|bias)$", name):  # GPT-2: queries, keys and values side by side in the last axis
        parts = [(old.hidden_size, new.hidden_size)] * 3
        return lambda tensor, shape: _blocks(tensor, shape, -1, parts)
    if re.search(r"\.qkv_proj\.(weight|bias)$", name):  # Phi-3: the same in the first axis
        size = getattr(old, "head_dim", None) or old.hidden_size // old.num_attention_heads
        pairs = [(c.num_attention_heads * size, c.num_key_value_heads * size) for c in (old, new)]
        queries, keys = zip(*pairs, strict=True)
        return lambda tensor, shape: _blocks(tensor, shape, 0, [queries, keys, keys])
    if re.search(r"\.gate_up_proj\.(weight|bias)$", name):
        halves = [(old.intermediate_size, new.intermediate_size)] * 2
        return lambda tensor, shape: _blocks(tensor, shape, 0, halves)
    return None


def narrow(model: "PreTrainedModel", size: Size, *, seed: int) -> "PreTrainedModel":
    """Return a smaller model with the given one's weights.

    Args:
        model: the teacher, on the CPU.
        size: what to keep.
        seed: of weights that the smaller model has and the teacher has not (none in the families that are tested).

    Raises:
        StageFailed: the size does not fit, or a tensor's layout is not known.
    """
    from transformers import AutoModelForCausalLM

    config, layers = narrow_config(model.config, size)
    torch.manual_seed(seed)
    student: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    source = model.state_dict()
    with torch.no_grad():
        for name, target in student.state_dict().items():
            origin = source.get(_source_name(name, layers))
            if origin is None:
                raise StageFailed(
                    f"the teacher has no weights for {name}, so that this architecture cannot be made smaller; "
                    f"use Llama or Continue"
                )
            cut = _leading if origin.shape == target.shape else _cutter(name, model.config, config)
            found = cut(origin, target.shape) if cut else None
            if found is None or found.shape != target.shape:
                raise StageFailed(
                    f"do not know how to cut {name} from {tuple(origin.shape)} to {tuple(target.shape)} in "
                    f"{type(model).__name__}; take fewer layers only (Smaller(layers=…))"
                )
            target.copy_(found)
    student.generation_config = copy.deepcopy(model.generation_config)
    return student.eval()
