"""One scheme applied to one model in memory by llm-compressor's `oneshot`.

Promises: calibration data is what the caller gives, in memory (`oneshot` alone would look for a data set by name);
what a scheme does not name keeps its dtype, routers always; nothing is written to the standard streams.
Does not: save, or measure. `oneshot` keeps a global session, so that one process quantizes one model.
"""

import contextlib
import gc
import io
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from stages.quantize.fitting import LayerPlan
from stages.quantize.job import Layers
from stages.quantize.recipes import layer_recipe, vocabulary_recipe
from stages.quantize.schemes import Scheme
from stages.runtime.workarounds import linearized_experts

ROUTER_NAMES = frozenset({"gate", "router", "shared_expert_gate"})
"""Last part of the names of layers that choose experts: small, and one changed choice changes everything after it."""


def split_experts(model: Any) -> None:
    """Give the experts of a mixture model linear layers of their own, in place, where transformers loads them back."""
    if any(_is_expert(name, parameter) for name, parameter in model.named_parameters()):
        linearized_experts(model)


def _is_expert(name: str, parameter: torch.Tensor) -> bool:
    """Whether a parameter holds the weights of several experts, which are no layers of their own."""
    return "experts" in name and parameter.ndim == 3


def find_layers(model: Any) -> Layers:
    """Return the linear layers that are quantized and those that are not; a model may have none of the former."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    in_features, ignored, names, num_weights = {}, [], {}, 0
    for name, module in model.named_modules():
        if module is head or module is embeddings:
            names[module] = name
        if not isinstance(module, torch.nn.Linear):
            continue
        if module is head or name.rpartition(".")[2] in ROUTER_NAMES:
            ignored.append(name)
        else:
            in_features[name] = module.in_features
            num_weights += module.weight.numel()
    in_experts = sum(weight.numel() for name, weight in model.named_parameters() if _is_expert(name, weight))
    vocabulary = tuple(names[module] for module in (embeddings, head) if module in names)
    return Layers(in_features, num_weights + in_experts, in_experts, tuple(ignored), vocabulary)


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
    model: Any,
    scheme: Scheme,
    plan: LayerPlan,
    *,
    layers: Layers,
    calibration: Sequence[Mapping[str, torch.Tensor]],
) -> None:
    """Quantize a model in place.

    Args:
        model: a causal language model in the type that it is to be stored in, its experts split.
        scheme: what to do.
        plan: what that is for each layer.
        layers: the model's layers, from `find_layers`.
        calibration: the inputs of each forward pass over the calibration rows.

    Raises:
        StageFailed: GPTQ could not solve a layer, or AWQ or SmoothQuant found none to scale.
    """
    from llmcompressor import oneshot, reset_session

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
    if recipe := layer_recipe(scheme, plan, layers):
        oneshot(model=model, recipe=recipe, processor=object(), **arguments)
    if scheme.vocabulary_bits:
        # By itself: in one recipe with GPTQ, layers are calibrated behind embeddings without scales (KL 1.6, not 0.3).
        reset_session()
        recipe = vocabulary_recipe(scheme.vocabulary_bits, layers)
        oneshot(model=model, recipe=recipe, processor=object(), pipeline="datafree")


def forget_session() -> None:
    """Let go of the model that `oneshot` keeps in its global session, so that the next one fits into memory."""
    from llmcompressor import reset_session

    reset_session()
    gc.collect()  # hooks refer to the model in circles
