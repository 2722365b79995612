"""What a checkpoint's config says of it: its parameters and the axes that people plot it by.

A model's number of parameters is that of the architecture that its config describes, with tied tensors counted once:
the same for a model and for its quantized versions, whose files also hold scales and packed integers.
"""

from pathlib import Path

from stages.models.checkpoints import model_config

__all__ = ["count_parameters", "read_axes"]


def count_parameters(folder: Path) -> int:
    """Return the number of parameters of a checkpoint's architecture, without reading its weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {key: value for key, value in model_config(folder).items() if key != "quantization_config"}
    config = AutoConfig.for_model(**values)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


def read_axes(folder: Path) -> dict[str, str]:
    """Return a checkpoint's shape and number format as short strings, from its `config.json`; absent where unknown.

    Where layers differ in format, all values are named: `4/8`.
    """
    config = model_config(folder)
    text = config.get("text_config") or config
    axes = {"layers": text.get("num_hidden_layers"), "width": text.get("hidden_size")}
    groups = (config.get("quantization_config") or {}).get("config_groups") or {}
    weights = [group["weights"] for group in groups.values() if group.get("weights")]
    for axis, key in (("bits", "num_bits"), ("group_size", "group_size")):
        values = sorted({w[key] for w in weights if w.get(key) is not None})
        axes[axis] = "/".join(map(str, values)) or None
    return {axis: str(value) for axis, value in axes.items() if value is not None}
