"""One scheme applied to one model in memory by llm-compressor's `oneshot`.

Promises: calibration data is what the caller gives, in memory (`oneshot` alone would look for a data set by name);
output head, embeddings and routers keep their dtype; nothing is written to the standard streams.
Does not: save, measure, or run twice in a process: `oneshot` keeps a global session.
"""

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from stages.errors import StageFailed
from stages.quantize.job import Layers
from stages.quantize.schemes import Scheme

ROUTER_NAMES = frozenset({"gate", "router", "shared_expert_gate"})
"""Last part of the names of layers that choose experts: small, and one changed choice changes everything after it."""


def find_layers(model: Any) -> Layers:
    """Return the linear layers that are quantized and those that are not; a model may have none of the former."""
    head = model.get_output_embeddings()
    in_features, ignored, num_weights = {}, [], 0
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        if module is head or name.rpartition(".")[2] in ROUTER_NAMES:
            ignored.append(name)
        else:
            in_features[name] = module.in_features
            num_weights += module.weight.numel()
    return Layers(in_features, num_weights, tuple(ignored))


def silence_libraries() -> None:
    """Keep llm-compressor's log off standard output (it reads this while it is imported), and a tokenizer's warning."""
    os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "ERROR")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep progress bars, logs and warnings of llm-compressor off the standard streams of this process."""
    silence_libraries()
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def quantize_model(
    model: Any, scheme: Scheme, *, layers: Layers, calibration: Sequence[Mapping[str, torch.Tensor]]
) -> None:
    """Quantize a model in place.

    Args:
        model: a causal language model that was loaded from a local folder.
        scheme: what to do.
        layers: the model's layers, from `find_layers`.
        calibration: the inputs of each forward pass over the calibration rows.

    Raises:
        StageFailed: GPTQ could not solve a layer, or a layer was left as it was.
    """
    from llmcompressor import oneshot

    arguments: dict[str, Any] = {"pipeline": "datafree"}
    if scheme.needs_calibration:
        arguments = {
            # Layer by layer, each calibrated behind the quantized ones before it, as the paper does; 0.7 s more than
            # all at once for 6 layers of width 192, and memory for one layer's activations only.
            "pipeline": "sequential",
            "dataset": torch.utils.data.DataLoader(calibration, batch_size=None),  # type: ignore[arg-type]
            "num_calibration_samples": len(calibration),
            "shuffle_calibration_samples": False,
        }
    # Any object keeps `oneshot` from searching for a processor; it only hands it to loaders of named data sets.
    oneshot(model=model, recipe=scheme.recipe(layers.in_features, layers.ignored), processor=object(), **arguments)
    wanted = scheme.quantized_layers(layers.in_features)
    left = [name for name in wanted if getattr(model.get_submodule(name), "quantization_scheme", None) is None]
    if left:
        raise StageFailed(
            f"{scheme.name} left {len(left)} layers as they were, e.g. {left[0]}; expected all to be quantized"
        )


def linear_bytes(model: Any, layers: Layers) -> int:
    """Return the bytes that the linear layers take, once `save_pretrained` has packed the model in place."""
    tensors = (tensor for name in layers.in_features for tensor in model.get_submodule(name).state_dict().values())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
