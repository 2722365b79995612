"""A model → the same architecture with fewer layers, heads, channels and neurons, with its weights where they fit.

What is kept of each is chosen by an `Importance` (`importance.py`), or without one by place: layers evenly spaced with
the first and the last (DistilBERT took every other: arXiv:1910.01108), of all else the leading ones. A head keeps its
size, and query heads stay with the key-value head they shared, so that what is copied still attends as it did.

Promise: works on names that transformers' configs share (`attribute_map` gives each family's own), and on any
architecture where only layers are taken; where a tensor would have to be cut and it is not known how its axes are laid
out, it is refused, never filled with noise.

Shapes: L layers, H attention heads, D channels of the residual stream, F neurons inside a feed-forward block.
"""

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stages.errors import StageFailed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

AXES = {
    r"\.(embed_tokens|wte|wpe)\.weight$|^lm_head\.weight$": ("all", "channels"),
    r"^lm_head\.bias$": ("all",),
    r"\.q_proj\.(weight|bias)$": ("queries", "channels"),
    r"\.[kv]_proj\.(weight|bias)$": ("keys", "channels"),
    r"\.qkv_proj\.(weight|bias)$": ("queries+keys+keys", "channels"),
    r"\.o_proj\.weight$": ("channels", "queries"),
    r"\.(gate|up)_proj\.(weight|bias)$": ("neurons", "channels"),
    r"\.gate_up_proj\.(weight|bias)$": ("neurons+neurons", "channels"),
    r"\.down_proj\.weight$": ("channels", "neurons"),
    r"\.(o|down|c)_proj\.bias$": ("channels",),
    r"\.c_attn\.weight$": ("channels", "queries+keys+keys"),  # GPT-2 holds its linear maps transposed
    r"\.c_attn\.bias$": ("queries+keys+keys",),
    r"\.attn\.c_proj\.weight$": ("queries", "channels"),
    r"\.c_fc\.weight$": ("channels", "neurons"),
    r"\.c_fc\.bias$": ("neurons",),
    r"\.mlp\.c_proj\.weight$": ("neurons", "channels"),
    r"\.([a-z_]*layernorm|norm|ln_\w+)\.(weight|bias)$": ("channels",),
}
"""Name of a tensor → what lies along its axes; a bias has the first axis of its weight. `+` joins blocks."""
LAYER_INDEX = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True, slots=True)
class Size:
    """What to keep; None keeps all."""

    layers: int | tuple[int, ...] | None = None
    """How many, or which."""
    heads: int | None = None
    width: int | None = None
    ffn_width: int | None = None
    """None follows `width`."""


@dataclass(frozen=True, slots=True)
class Importance:
    """How much each part of a model does on real text; only the order within each tensor counts.

    None where a model has no such parts, or none that are known.
    """

    layers_L: Tensor
    heads_LH: Tensor | None
    channels_D: Tensor | None
    neurons_LF: Tensor | None


@dataclass(frozen=True, slots=True)
class Cut:
    """What of the larger model is kept."""

    layers: tuple[int, ...]
    heads: tuple[tuple[int, ...], ...]
    """Of each kept layer."""
    kv_heads: tuple[tuple[int, ...], ...]
    channels: tuple[int, ...]
    neurons: tuple[tuple[int, ...], ...]


def evenly_spaced(total: int, kept: int) -> tuple[int, ...]:
    """Return `kept` of `total` layer indexes, evenly spaced, the first and the last among them."""
    if kept == 1:
        return (0,)
    return tuple(round(i * (total - 1) / (kept - 1)) for i in range(kept))


def most_important(scores_N: Tensor, kept: int) -> tuple[int, ...]:
    """Return the places of the highest scores in ascending order; of equal ones the leading."""
    order = torch.argsort(scores_N, descending=True, stable=True)
    return tuple(sorted(order[:kept].tolist()))


def choose(config: Any, size: Size, importance: Importance | None = None) -> Cut:
    """Return what to keep of a model.

    Args:
        config: the larger model's.
        size: how much to keep.
        importance: by what to choose; None chooses by place.

    Raises:
        StageFailed: a size is above the model's, or does not divide.
    """
    layers, heads, width = _layers(config, size, importance), *_heads_and_width(config, size)
    all_heads, inner = _num_heads(config), _inner(config)
    kept_inner = size.ffn_width or _inner_like(inner, width, config.hidden_size)
    if inner and kept_inner > inner:
        raise StageFailed(f"Smaller.ffn_width is {kept_inner}, expected at most the origin's {inner}")
    if size.ffn_width and not inner:
        raise StageFailed("Smaller.ffn_width is set, and the origin's config names no feed-forward width; leave it out")
    all_kv = getattr(config, "num_key_value_heads", None) or all_heads
    kv_heads = _kv_heads(all_heads // all_kv, heads)
    total = config.num_hidden_layers

    def scores(what: str, *shape: int, is_cut: bool) -> Tensor:
        found: Tensor | None = getattr(importance, what, None)
        if found is None and importance is not None and is_cut:
            raise StageFailed(
                f"cannot tell how important the {what.partition('_')[0]} of {type(config).__name__} are, and some are "
                "to go; set Smaller.choice='position', or keep them all"
            )
        return torch.zeros(shape, device="cpu") if found is None else found  # also where the model is on `meta`

    heads_LH = scores("heads_LH", total, all_heads, is_cut=heads < all_heads)
    neurons_LF = scores("neurons_LF", total, inner, is_cut=kept_inner < inner)
    channels_D = scores("channels_D", config.hidden_size, is_cut=width < config.hidden_size)
    pairs = [_choose_heads(heads_LH[layer].view(all_kv, -1), kv_heads, heads // kv_heads) for layer in layers]
    return Cut(
        layers,
        tuple(queries for queries, _ in pairs),
        tuple(keys for _, keys in pairs),
        most_important(channels_D, width),
        tuple(most_important(neurons_LF[layer], kept_inner) for layer in layers),
    )


def _layers(config: Any, size: Size, importance: Importance | None) -> tuple[int, ...]:
    """Return the layers to keep: those named, else the first, the last and the most important others."""
    total, wanted = config.num_hidden_layers, size.layers
    if isinstance(wanted, tuple):
        if list(wanted) != sorted(set(wanted)) or not wanted or not 0 <= wanted[0] <= wanted[-1] < total:
            raise StageFailed(f"Smaller.layers is {wanted}, expected ascending layers of 0 to {total - 1}")
        return wanted
    _check_at_most("layers", wanted, total)
    kept = wanted or total
    if importance is None or kept < 3:
        return evenly_spaced(total, kept)
    scores_L = importance.layers_L.clone()
    scores_L[[0, -1]] = torch.inf  # the first and the last do what no other does (arXiv:2403.03853, section 4)
    return most_important(scores_L, kept)


def _choose_heads(scores_KG: Tensor, kept_groups: int, heads_each: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the query heads and the key-value heads to keep, given the scores of the heads that share each."""
    group = scores_KG.shape[1]
    groups = most_important(scores_KG.topk(heads_each, dim=1).values.sum(1), kept_groups)
    heads = [k * group + g for k in groups for g in most_important(scores_KG[k], heads_each)]
    return tuple(heads), groups


def _check_at_most(name: str, wanted: int | None, most: int) -> None:
    if wanted is not None and wanted > most:
        raise StageFailed(f"Smaller.{name} is {wanted}, expected at most the origin's {most}")


def _heads_and_width(config: Any, size: Size) -> tuple[int, int]:
    """Return kept heads and width, checked against the model's own."""
    heads, width = _num_heads(config), config.hidden_size
    if (size.heads or size.width) and not getattr(config, "num_attention_heads", None):
        raise StageFailed(
            f"Smaller.heads and Smaller.width need a model with attention heads, and {type(config).__name__} names "
            "none; take fewer layers only (Smaller(layers=…))"
        )
    _check_at_most("heads", size.heads, heads)
    _check_at_most("width", size.width, width)
    own_head_size = getattr(config, "head_dim", None) is not None
    head_size: int = config.head_dim if own_head_size else width // heads
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
    return new_heads, new_width


def _kv_heads(group: int, heads: int) -> int:
    """Return the key-value heads that go with fewer heads, so that groups keep their size."""
    if heads > group and heads % group:
        raise StageFailed(
            f"Smaller has {heads} heads, expected a multiple of {group}, the heads that share keys and values"
        )
    return max(1, heads // group)


def _num_heads(config: Any) -> int:
    """Return the attention heads; 1 where there is no attention (Mamba), so that all of it is kept."""
    return getattr(config, "num_attention_heads", None) or 1


def _inner(config: Any) -> int:
    """Return the neurons of a feed-forward block; 0 where the config names none."""
    of_gpt2 = 4 * config.hidden_size if hasattr(config, "n_inner") else 0
    return getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or of_gpt2


def _inner_like(inner: int, width: int, all_width: int) -> int:
    """Return the neurons that go with a width: the same share, rounded up to what groups of quantization divide."""
    step = next(step for step in (128, 64, 32, 1) if inner % step == 0)
    return min(inner, -(-(inner * width // all_width) // step) * step)


def narrow_config(config: Any, cut: Cut) -> Any:
    """Return the config of the smaller model."""
    values = copy.deepcopy(config.to_dict())
    own = getattr(config, "attribute_map", {})
    sizes = {"num_hidden_layers": len(cut.layers), "hidden_size": len(cut.channels)}
    for name, heads in (("num_attention_heads", cut.heads), ("num_key_value_heads", cut.kv_heads)):
        if getattr(config, name, None) is not None:
            sizes[name] = len(heads[0])
    for name in ("intermediate_size", "n_inner"):
        if own.get(name, name) in values and cut.neurons[0]:
            sizes[name] = len(cut.neurons[0])
    for name, value in sizes.items():
        values[own.get(name, name)] = value
    for name, value in values.items():
        if isinstance(value, list) and "layer" in name and len(value) == config.num_hidden_layers:
            values[name] = [value[layer] for layer in cut.layers]
    if isinstance(values.get("max_window_layers"), int):
        values["max_window_layers"] = min(values["max_window_layers"], len(cut.layers))
    return type(config).from_dict(values)


def narrow(model: "PreTrainedModel", size: Size, *, seed: int, importance: Importance | None = None) -> Any:
    """Return a smaller model with the given one's weights.

    Args:
        model: the larger one, on the CPU.
        size: what to keep.
        seed: of weights that the smaller model has and the larger has not (none in the families that are tested).
        importance: by what to choose what is kept; None chooses by place.

    Raises:
        StageFailed: the size does not fit, or a tensor's layout is not known.
    """
    from transformers import AutoModelForCausalLM

    cut = choose(model.config, size, importance)
    torch.manual_seed(seed)
    student: PreTrainedModel = AutoModelForCausalLM.from_config(narrow_config(model.config, cut), dtype=torch.float32)
    source = model.state_dict()
    with torch.no_grad():
        for name, target in student.state_dict().items():
            layer = LAYER_INDEX.search(name)
            place = int(layer[0]) if layer else 0
            origin = source.get(LAYER_INDEX.sub(str(cut.layers[place]), name, count=1))
            if origin is None:
                raise StageFailed(
                    f"the teacher has no weights for {name}, so that this architecture cannot be made smaller; "
                    f"use Llama or Continue"
                )
            found = _take(name, origin, cut, model.config, place)
            if found is None or found.shape != target.shape:
                raise StageFailed(
                    f"do not know how to cut {name} from {tuple(origin.shape)} to {tuple(target.shape)} in "
                    f"{type(model).__name__}; take fewer layers only (Smaller(layers=…))"
                )
            target.copy_(found)
    student.generation_config = copy.deepcopy(model.generation_config)
    return student.eval()


def _take(name: str, tensor: Tensor, cut: Cut, config: Any, place: int) -> Tensor | None:
    """Return what is kept of a tensor; None where something would be cut and its layout is not known."""
    num_heads = _num_heads(config)
    head_size = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    all_kv = getattr(config, "num_key_value_heads", None) or num_heads
    kept = {
        "channels": (cut.channels, config.hidden_size),
        "neurons": (cut.neurons[place], _inner(config)),
        "queries": (_rows_of(cut.heads[place], head_size), num_heads * head_size),
        "keys": (_rows_of(cut.kv_heads[place], head_size), all_kv * head_size),
    }
    axes = next((axes for pattern, axes in AXES.items() if re.search(pattern, name)), None)
    if axes is None or len(axes) < tensor.dim():
        whole = all(len(indexes) == total for indexes, total in kept.values())
        return tensor if whole or re.search(r"\.[qk]_norm\.weight$", name) else None
    for axis, what in enumerate(axes[: tensor.dim()]):
        if what == "all":
            continue
        indexes: list[int] = []
        start = 0
        for block in what.split("+"):
            found, total = kept[block]
            indexes += [start + index for index in found]
            start += total
        if start != tensor.shape[axis]:
            return None
        tensor = tensor.index_select(axis, torch.tensor(indexes))
    return tensor


def _rows_of(heads: Sequence[int], head_size: int) -> tuple[int, ...]:
    return tuple(head * head_size + i for head in heads for i in range(head_size))
