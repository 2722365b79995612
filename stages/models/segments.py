"""How packed rows are run: each segment of a row as if it were alone.

A row holds segments (a document, a chat, a window of a long text), and the position of each token within its segment
says where one ends. transformers' models take them as `position_ids` and make the block-diagonal mask themselves where
neither attention mask nor cache is given (`transformers.masking_utils.find_packed_sequence_indices`), if their family
does so at all: some compute positions of their own (BART), some keep a state that no mask stops (Mamba), and
flash-attention kernels see segments in batches of one row only.

The one rule: `keeps_segments_apart` asks the loaded model itself, with two segments in a row and the second one alone.
Where a model keeps them apart, whole rows go through it; where not, each segment becomes a row of its own, together
with those of equal length. Teachers, students, calibration, fidelity and evaluation all ask here.

Promise: a token's outputs are those that it has in its segment alone, up to rounding, whatever else lies in its row.
Cost: segments apart are as many tokens as whole rows, in as many forward passes as there are lengths of them.

Shapes: B rows, T tokens of a row, N = B · T, S segments of L tokens each, X width of an output.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stages.errors import OutOfMemory, Transient
from stages.runtime.translation import one_line, translate

__all__ = ["SEGMENTS_ALONE", "RowOutputs", "keeps_segments_apart", "row_inputs", "run_rows"]

logger = logging.getLogger(__name__)

PROBED_TOKENS = 6
"""Tokens of each segment of the probe: several positions for an error to show at, and nearly nothing to compute."""

QUANTIZED_EPSILON = 2.0**-8
"""Of activations that are rounded to 8 bits, where a difference in the last place may become one of a whole step."""
SEGMENTS_ALONE = (
    "{}'s architecture does not keep documents of one row apart, so each is run as a row of its own, which is slower"
)
"""What people are told of a model that has no whole rows."""


@dataclass(frozen=True, slots=True)
class RowOutputs:
    """What a network gives for each token of some rows."""

    values_NX: Tensor
    """Logits, or of a backbone the last hidden state."""
    hidden_states: tuple[Tensor, ...]
    """`[N, D]` each; empty where none were asked for."""
    router_balance: Tensor | None = None
    """A mixture's own load-balancing loss, a mean over tokens; None where it was not asked for."""


def run_rows(
    network: Any,
    input_ids_BT: Tensor,
    positions_BT: Tensor,
    *,
    whole: bool,
    hidden_states: bool = False,
    router_balance: bool = False,
) -> RowOutputs:
    """Run packed rows through a causal language model or its backbone, each segment as if it were alone.

    Args:
        network: what is called.
        input_ids_BT: int64.
        positions_BT: of each token within its segment.
        whole: whether the network keeps segments apart by itself (`keeps_segments_apart`).
        hidden_states: whether hidden states are wanted too: the embeddings, then each layer's output.
        router_balance: whether a mixture's load-balancing loss is wanted too.
    """
    options = {"output_hidden_states": True} if hidden_states else {}
    if router_balance:
        options["output_router_logits"] = True
    if whole:
        return _outputs(network, options, input_ids=input_ids_BT, position_ids=positions_BT.long())
    parts, places, balances = [], [], []
    for place_SL in _places_of_segments(positions_BT):
        found = _outputs(network, options, input_ids=input_ids_BT.flatten()[place_SL])
        if found.router_balance is not None:
            balances.append(found.router_balance * (place_SL.numel() / positions_BT.numel()))
        parts.append([found.values_NX, *found.hidden_states])
        places.append(place_SL.flatten())
    order_N = torch.cat(places).argsort()
    values_NX, *hidden = (torch.cat(column).index_select(0, order_N) for column in zip(*parts, strict=True))
    return RowOutputs(values_NX, tuple(hidden), torch.stack(balances).sum() if balances else None)


def _outputs(network: Any, options: dict[str, bool], **inputs: Tensor) -> RowOutputs:
    found = network(**inputs, use_cache=False, **options)
    logits_BTV = getattr(found, "logits", None)
    values_BTX = found.last_hidden_state if logits_BTV is None else logits_BTV
    states = found.hidden_states if "output_hidden_states" in options else ()
    balance = found.aux_loss if "output_router_logits" in options else None
    return RowOutputs(values_BTX.flatten(0, 1), tuple(state_BTD.flatten(0, 1) for state_BTD in states), balance)


def _places_of_segments(positions_BT: Tensor) -> Iterator[Tensor]:
    """Yield where tokens lie in the flattened rows, `[S, L]`: all segments of one length, then those of the next."""
    starts_S = (positions_BT.flatten() == 0).nonzero()[:, 0]
    lengths_S = torch.diff(starts_S, append=starts_S.new_tensor([positions_BT.numel()]))
    for length in sorted(set(lengths_S.tolist())):
        yield starts_S[lengths_S == length, None] + torch.arange(length, device=starts_S.device)


def row_inputs(
    input_ids_RT: Tensor, positions_RT: Tensor, filled_RT: Tensor, *, whole: bool, batch_rows: int
) -> list[dict[str, Tensor]]:
    """Return packed rows as the inputs of forward passes, for a library that calls the model itself.

    Args:
        input_ids_RT: int64.
        positions_RT: of each token within its segment.
        filled_RT: False at padding.
        whole: whether the model keeps segments apart by itself; where not, each is a batch of its own, without padding.
        batch_rows: rows of one forward pass, where they are whole.
    """
    if whole:
        batches = zip(
            *(torch.split(each_RT, batch_rows) for each_RT in (input_ids_RT, positions_RT.long())), strict=True
        )
        return [{"input_ids": ids_BT, "position_ids": positions_BT} for ids_BT, positions_BT in batches]
    starts_S = (positions_RT.flatten() == 0).nonzero()[:, 0]
    segments = zip(
        *(each_RT.flatten().tensor_split(starts_S[1:].cpu()) for each_RT in (input_ids_RT, filled_RT)), strict=True
    )
    return [{"input_ids": ids_L[None]} for ids_L, filled_L in segments if bool(filled_L[0])]


@torch.inference_mode()
def keeps_segments_apart(model: Any) -> bool:
    """Return whether a loaded model, told the positions, computes a segment as if nothing were before it in its row.

    Two rows hold different first segments and the same second one. What the second one's logits differ by from those
    that it has alone must be rounding: at most ε^(2/3) of what they differ by where the model is told nothing, with ε
    of the type that it computes in (2⁻⁸ where it rounds activations to 8 bits). Seen in 24 families with random
    weights: up to 3e-7 in float32 and 0.008 in bfloat16 where segments are kept apart, of limits 2e-5 and 0.04, and
    3e-4 (LFM2, through short convolutions) to 1 where not. A model that is being trained is put into evaluation mode.
    """
    size, device = model.config.get_text_config().vocab_size, model.device
    drawn = torch.randint(size, (3, PROBED_TOKENS), generator=torch.Generator().manual_seed(0)).to(device)
    alone_BT = drawn[2:]
    rows_BT = torch.cat([drawn[:2], alone_BT.expand(2, -1)], 1)
    positions_BT = torch.arange(PROBED_TOKENS, device=device).repeat(2).expand(2, -1)
    training = model.training
    model.eval()
    try:
        expected_TV = model(input_ids=alone_BT, use_cache=False).logits[0].float()
        told_BTV, mixed_BTV = (
            model(input_ids=rows_BT, use_cache=False, **options).logits[:, PROBED_TOKENS:].float()
            for options in ({"position_ids": positions_BT}, {})
        )
    except Exception as error:  # any model's code runs here: one that does not know positions gets segments alone
        if isinstance(translate(error), OutOfMemory | Transient) or isinstance(error, torch.AcceleratorError):
            raise
        logger.info("deciding to run each segment alone, since positions are refused: %s", one_line(error))
        return False
    finally:
        model.train(training)
    distance, contamination = (float((found - expected_TV).norm()) for found in (told_BTV, mixed_BTV))
    epsilon: float = torch.finfo(model.dtype).eps
    if getattr(model.config, "quantization_config", None) is not None:
        epsilon = max(epsilon, QUANTIZED_EPSILON)
    apart = distance <= float(epsilon ** (2 / 3)) * contamination
    way = "whole rows" if apart else "each segment alone"
    logger.info("deciding to run %s, since segments of a row err by %.2g, untold %.2g", way, distance, contamination)
    return apart
