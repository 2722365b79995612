"""How much each part of a model does on real text: what is kept of it when it is made smaller.

From one forward pass over some rows, without gradients, as Minitron does (arXiv:2407.14679, section 2.2): of a
feed-forward neuron the mean size of what it puts out, of a head the mean norm of what it puts out, of a channel the
mean size of what the norms put out there, summed over them; each a mean over the tokens of a row, and L2 over rows.
Of a layer its block influence, 1 − E[cos(what goes in, what comes out)] (ShortGPT, arXiv:2403.03853, equation 1).

Promises: padding counts nothing; the model is as it was before. Does not: choose (`narrowing`).

Shapes: B rows, T tokens of a row, L layers, H attention heads, D channels, F neurons.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from stages.errors import StageFailed
from stages.models.narrowing import Importance

__all__ = ["observe_importance"]

HEAD_OUTPUT = re.compile(r"\.(o_proj|attn\.c_proj)$")
"""Modules that read what the heads put out, side by side."""
NEURON_OUTPUT = re.compile(r"\.(down_proj|mlp\.c_proj)$")
"""Modules that read what the neurons put out."""
NORM = re.compile(r"(layernorm|\.norm|\.ln_\w+|^norm|^ln_\w+)$")


class _Sums:
    """Sums over rows of the squares of each row's mean over tokens, by name."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.valid_BT1 = torch.empty(0)

    def add(self, name: str, values_BTX: Tensor) -> None:
        """Add sizes of each token."""
        weights_BT1 = self.valid_BT1.to(values_BTX.dtype)
        mean_BX = (values_BTX * weights_BT1).sum(1) / weights_BT1.sum(1).clamp(min=1)
        sums_X = mean_BX.float().square().sum(0)
        self.sums[name] = self.sums[name] + sums_X if name in self.sums else sums_X


@torch.inference_mode()
def observe_importance(model: Any, batches: Iterable[tuple[Mapping[str, Tensor], Tensor]]) -> Importance:
    """Run a model over text and return what its parts do there, on the CPU.

    Args:
        model: a causal language model, in evaluation mode.
        batches: (inputs of a forward pass, as `segments.row_inputs` gives them; which tokens [B, T] are no padding), on
            the model's device.

    Raises:
        StageFailed: its layers are not found.
    """
    backbone, config = model.base_model, model.config.get_text_config()
    layers = _layers(backbone, config.num_hidden_layers)
    sums = _Sums()
    with ExitStack() as stack:
        for index, (prefix, layer) in enumerate(layers):
            stack.callback(layer.register_forward_hook(_block_hook(sums, f"layer.{index}"), with_kwargs=True).remove)
            for name, module in layer.named_modules():
                path = f"{prefix}.{name}"
                if HEAD_OUTPUT.search(path):
                    hook = _input_hook(sums, f"heads.{index}", config.num_attention_heads)
                    stack.callback(module.register_forward_pre_hook(hook).remove)
                elif NEURON_OUTPUT.search(path):
                    stack.callback(module.register_forward_pre_hook(_input_hook(sums, f"neurons.{index}")).remove)
        for name, module in backbone.named_modules():
            weight = getattr(module, "weight", None)
            if NORM.search(name) and weight is not None and weight.shape == (config.hidden_size,):
                stack.callback(module.register_forward_hook(_norm_hook(sums, f"channels.{name}")).remove)
        for inputs, valid_BT in batches:
            sums.valid_BT1 = valid_BT[..., None]
            model(**inputs, use_cache=False)
    found = {name: total.sqrt().cpu() for name, total in sums.sums.items()}

    def each(kind: str) -> Tensor | None:
        of_kind = [found.get(f"{kind}.{layer}") for layer in range(len(layers))]
        return torch.stack(known) if len(known := [one for one in of_kind if one is not None]) == len(layers) else None

    norms = [value for name, value in found.items() if name.startswith("channels.")]
    influence_L1 = torch.stack([found[f"layer.{layer}"] for layer in range(len(layers))])
    channels_D = torch.stack(norms).sum(0) if norms else None
    return Importance(influence_L1[:, 0], each("heads"), channels_D, each("neurons"))


def _layers(backbone: Any, num_layers: int) -> list[tuple[str, nn.Module]]:
    """Return a backbone's layers with their names, in order.

    Raises:
        StageFailed: there is no list of so many modules.
    """
    for name, module in backbone.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return [(f"{name}.{index}", layer) for index, layer in enumerate(module)]
    raise StageFailed(
        f"{type(backbone).__name__} has no list of its {num_layers} layers, so that their importance cannot be told; "
        "set Smaller.choice='position'"
    )


def _block_hook(sums: _Sums, name: str) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        before_BTD = args[0] if args else kwargs["hidden_states"]
        after_BTD = output[0] if isinstance(output, tuple) else output
        influence_BT = 1 - functional.cosine_similarity(before_BTD.float(), after_BTD.float(), dim=-1)
        sums.add(name, influence_BT[..., None])

    return hook


def _input_hook(sums: _Sums, name: str, num_groups: int | None = None) -> Callable[..., None]:
    """Return a hook that adds the size of what a module reads: of each entry, or the norm of each of some groups."""

    def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
        read_BTX = args[0].float()
        if num_groups:
            sums.add(name, read_BTX.unflatten(-1, (num_groups, -1)).norm(dim=-1))
        else:
            sums.add(name, read_BTX.abs())

    return hook


def _norm_hook(sums: _Sums, name: str) -> Callable[..., None]:
    def hook(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
        sums.add(name, output.float().abs())

    return hook
