"""A model's output head, replayed: from what the backbone computes at a position to the model's logits there.

Logits of a vocabulary of 128,256 are 31 times larger than the vectors of width 4,096 that they come from. So stages run
the backbone, keep its vectors (the *states*), and make logits of some positions at a time; another process makes the
same ones later, from the states and the head.

The one rule: `observe_head` runs the model on real tokens, then its backbone, and replays the head on what that gives.
Where these are the model's own logits bit for bit, the head is replayed; where not (a head that is no plain linear map,
a factor that is not known here, a step, a projection or a cast between backbone and head, a backbone that cannot be run
by itself), the states are the logits themselves. There is no tolerance:
the observed replay does what the model does in the same shape and order, so that equal is equal (0 differing bits in
float32, bfloat16 and float16 on CPU, for Llama, GPT-2, Gemma 2, Cohere, Granite and OPT), while a bound that leaves
room for bfloat16's rounding (3 % of the largest logit) overlooks a soft cap that is four times as large as the logits.

A head that is replayed then computes in float32, from states of whatever type: rounded to bfloat16, logits of 16 to 32
err by 0.06 to 0.125, which is noise of a number format and no knowledge of a teacher, nor a loss of a candidate.

Promises: every causal language model of transformers has a path that works; logits are over the dataset's vocabulary
only, a padded head's other entries are cut off before anything is normalized; logits are float32. Products
for other numbers of positions than the model's own pass round differently: by a unit or two in the last place.
Memory: a state is `D` numbers of the model's dtype, or, where whole logits are kept, `V`.
Rows are packed: each segment is run as if it were alone (`stages.models.segments`).

Shapes: B rows, T tokens of a row, N positions, D width of the backbone, V the dataset's vocabulary, X either of both.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from stages.errors import OutOfMemory, Transient
from stages.models.segments import keeps_segments_apart, run_rows
from stages.runtime.translation import one_line, translate, within_memory

__all__ = ["Head", "PackedHead", "PackedTensor", "log_prob_chunks", "observe_head"]

logger = logging.getLogger(__name__)

OBSERVED_TOKENS = 64
"""Tokens of the first row that a head is observed on: 64 × 262,144 logits in float32 are 67 MB."""
CHUNK_BYTES = 256 * 1024 * 1024
"""Memory for one chunk of positions: a float32 `[N, V]` of each model that is compared, and `WORK_TENSORS` besides."""
WORK_TENSORS = 4
"""`[N, V]` float32 tensors that live at once: logits before their softmax, and the terms of a divergence."""
UPCAST_BYTES = 64 * 1024 * 1024
"""Memory for the part of a head's weight that is float32 for a moment, where no product of half types gives float32."""
MIN_CHUNK_POSITIONS = 256
"""Positions of a chunk, whatever its memory: with fewer, each product with the head reads more than it computes."""


@dataclass(frozen=True, slots=True)
class PackedTensor:
    """A tensor as an array, which Ray hands to other processes without a copy; bfloat16, unknown to numpy, as bits."""

    array: NDArray[Any]
    dtype: str

    @classmethod
    def of(cls, tensor: Tensor) -> "PackedTensor":
        """Pack a tensor from any device."""
        plain = tensor.detach().cpu().contiguous()
        bits = plain.view(torch.int16) if plain.dtype == torch.bfloat16 else plain
        return cls(bits.numpy(), str(plain.dtype).removeprefix("torch."))

    def tensor(self, device: Any, rows: slice = slice(None)) -> Tensor:
        """Return a copy of the tensor, or of some of its rows, on a device."""
        return torch.from_numpy(np.array(self.array[rows])).view(getattr(torch, self.dtype)).to(device)


@dataclass(frozen=True, slots=True)
class Head:
    """A model's output head over the dataset's vocabulary; without a weight, states are the logits themselves."""

    vocabulary_size: int
    weight_VD: Tensor | None = None
    bias_V: Tensor | None = None
    scale: float = 1.0
    """Factor on the logits (Cohere's `logit_scale`)."""
    divisor: float = 1.0
    """Divides the logits (Granite's `logits_scaling`)."""
    softcap: float | None = None
    """Logits are squeezed into ± this by tanh (Gemma's `final_logit_softcapping`)."""
    whole_rows: bool = False
    """Whether the model keeps the segments of a row apart by itself; where not, each is run as a row of its own."""

    @property
    def is_replayed(self) -> bool:
        """Whether states are the backbone's vectors, not whole logits."""
        return self.weight_VD is not None

    def states(self, model: Any, input_ids_BT: Tensor, positions_BT: Tensor, chosen_BT: Tensor | None = None) -> Tensor:
        """Run a model over rows and return its states `[N, X]` at the chosen positions, at all where none are given."""
        states_NX, _ = self.run(model, input_ids_BT, positions_BT)
        return states_NX if chosen_BT is None else states_NX[chosen_BT.flatten()]

    def run(
        self, model: Any, input_ids_BT: Tensor, positions_BT: Tensor, *, hidden_states: bool = False
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Run a model over rows and return its states `[N, X]` at all positions, and its hidden states `[N, D]`.

        Hidden states, where they are asked for, are what transformers calls so: the embeddings, then each layer's
        output, in most families the last one's after the final norm.

        Args:
            model: the model that the head was observed on.
            input_ids_BT: int64.
            positions_BT: of each token within its segment.
            hidden_states: whether they are wanted.
        """
        network = model.base_model if self.is_replayed else model
        found = run_rows(network, input_ids_BT, positions_BT, whole=self.whole_rows, hidden_states=hidden_states)
        # Cut as flat rows: the other way round a padded head's logits would be copied.
        states_NX = found.values_NX if self.is_replayed else found.values_NX[:, : self.vocabulary_size]
        return states_NX, found.hidden_states

    def logits(self, states_NX: Tensor, out: Tensor | None = None) -> Tensor:
        """Return float32 logits `[N, V]`; into `out`, float32 [N, V], where it is given and the head is replayed."""
        if self.weight_VD is None:
            return states_NX.float()
        if self.weight_VD.dtype in (torch.bfloat16, torch.float16):
            logits_NV = _float32_product(states_NX, self.weight_VD, out)
            return self._scaled(logits_NV if self.bias_V is None else logits_NV.add_(self.bias_V))
        if out is None:
            return self._scaled(functional.linear(states_NX, self.weight_VD, self.bias_V))
        if self.bias_V is None:
            return self._scaled(torch.mm(states_NX, self.weight_VD.t(), out=out))
        return self._scaled(torch.addmm(self.bias_V, states_NX, self.weight_VD.t(), out=out))

    def observed_logits(self, states_NX: Tensor) -> Tensor:
        """Return logits `[N, V]` as the model itself makes them, in its own type."""
        if self.weight_VD is None:
            return states_NX
        return self._scaled(functional.linear(states_NX, self.weight_VD, self.bias_V))

    def _scaled(self, logits_NV: Tensor) -> Tensor:
        # In the order and in the operations of the models: a product with 1/6 is not a division by 6.
        if self.scale != 1.0:
            logits_NV *= self.scale
        if self.divisor != 1.0:
            logits_NV /= self.divisor
        if self.softcap is not None:
            logits_NV.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits_NV

    def log_probs(self, states_NX: Tensor) -> Tensor:
        """Return float32 log-probabilities `[N, V]`."""
        return self.logits(states_NX).log_softmax(-1)

    def pack(self) -> "PackedHead":
        """Return the head in a form that travels between processes."""
        weight = None if self.weight_VD is None else PackedTensor.of(self.weight_VD)
        bias = None if self.bias_V is None else PackedTensor.of(self.bias_V)
        return PackedHead(self.vocabulary_size, weight, bias, self.scale, self.divisor, self.softcap, self.whole_rows)


def _float32_product(states_NX: Tensor, weight_VD: Tensor, out: Tensor | None) -> Tensor:
    """Return float32 `states · weightᵀ` of half types, whose products are exact in float32."""
    if states_NX.device.type == "cuda":
        return torch.mm(states_NX, weight_VD.t(), out_dtype=torch.float32, out=out)
    entries, width = weight_VD.shape
    logits_NV = torch.empty(len(states_NX), entries, device=states_NX.device) if out is None else out
    exact_ND, size = states_NX.float(), max(1, UPCAST_BYTES // (4 * width))
    for start in range(0, entries, size):
        part = slice(start, start + size)
        logits_NV[:, part] = exact_ND @ weight_VD[part].float().t()
    return logits_NV


@dataclass(frozen=True, slots=True)
class PackedHead:
    """A head on its way to another process; see `Head`."""

    vocabulary_size: int
    weight: PackedTensor | None
    bias: PackedTensor | None
    scale: float
    divisor: float
    softcap: float | None
    whole_rows: bool

    def unpack(self, device: Any) -> Head:
        """Return the head on a device."""
        weight_VD = None if self.weight is None else self.weight.tensor(device)
        bias_V = None if self.bias is None else self.bias.tensor(device)
        return Head(self.vocabulary_size, weight_VD, bias_V, self.scale, self.divisor, self.softcap, self.whole_rows)


@torch.inference_mode()
def observe_head(model: Any, input_ids_BT: Tensor, vocabulary_size: int, *, whole_rows: bool | None = None) -> Head:
    """Return a loaded model's head, as it is to be replayed, or one that keeps whole logits.

    Runs a few short forward passes: those of `keeps_segments_apart`, one of the model, and one of its backbone alone as
    `Head.run` runs it; the first also makes a compressed checkpoint unpack its weights.

    Args:
        model: a causal language model in evaluation mode.
        input_ids_BT: rows of real tokens, of which the first one's beginning is used.
        vocabulary_size: entries of the dataset's vocabulary; a head may be padded to more.
        whole_rows: whether it keeps segments apart, where that is known of the model that it was made from.

    Raises:
        OutOfMemory: not even those tokens fit.
    """
    first_BT = input_ids_BT[:1, :OBSERVED_TOKENS]
    with within_memory(f"observing the output head of {type(model).__name__}"):
        whole_rows = keeps_segments_apart(model) if whole_rows is None else whole_rows
        logits_BTV = model(input_ids=first_BT, use_cache=False).logits
        whole = _read_head(model, logits_BTV.shape[-1], whole_rows)
        if whole is None or not _gives(whole, model, first_BT, logits_BTV.flatten(0, 1)):
            logger.info("deciding to take whole logits, since %s's head cannot be replayed", type(model).__name__)
            return Head(vocabulary_size, whole_rows=whole_rows)
    logger.info("deciding to replay the output head, since it gives the model's logits bit for bit")
    assert whole.weight_VD is not None, "a head that was read has one"
    bias_V = None if whole.bias_V is None else whole.bias_V[:vocabulary_size]
    weight_VD = whole.weight_VD[:vocabulary_size]
    return replace(whole, vocabulary_size=vocabulary_size, weight_VD=weight_VD, bias_V=bias_V)


def _gives(head: Head, model: Any, input_ids_BT: Tensor, logits_NV: Tensor) -> bool:
    """Whether a head, replayed on what the backbone alone computes, gives the model's own logits bit for bit."""
    try:
        positions_BT = torch.arange(input_ids_BT.shape[1], device=input_ids_BT.device)[None]
        states_NX = head.states(model, input_ids_BT, positions_BT)
        return torch.equal(head.observed_logits(states_NX).to(logits_NV.dtype), logits_NV)
    except Exception as error:  # any model's code runs here: what it cannot do by itself is not replayed
        if isinstance(translate(error), OutOfMemory | Transient) or isinstance(error, torch.AcceleratorError):
            raise
        logger.info("the head cannot be replayed: %s", one_line(error))
        return False


def _read_head(model: Any, num_entries: int, whole_rows: bool) -> Head | None:
    """Return the head that a model's modules and config describe, padding included; None where it is no linear map."""
    layer = model.get_output_embeddings()
    if type(layer) is not nn.Linear:
        return None
    bias_V = None if layer.bias is None else layer.bias.detach()
    config = model.config.get_text_config()
    factors = [getattr(config, name, None) for name in ("logit_scale", "logits_scaling", "final_logit_softcapping")]
    scale, divisor, softcap = factors
    weight_VD = layer.weight.detach()
    return Head(num_entries, weight_VD, bias_V, float(scale or 1.0), float(divisor or 1.0), softcap, whole_rows)


def log_prob_chunks(*models: tuple[Head, Tensor]) -> Iterator[tuple[slice, Sequence[Tensor]]]:
    """Yield, some positions at a time, which they are and each model's log-probabilities there, `[n, V]` float32.

    Args:
        models: heads over one vocabulary, each with its states at the same positions.
    """
    head, states_NX = models[0]
    size = max(MIN_CHUNK_POSITIONS, CHUNK_BYTES // (head.vocabulary_size * 4 * (len(models) + WORK_TENSORS)))
    for start in range(0, len(states_NX), size):
        chunk = slice(start, start + size)
        yield chunk, [each.log_probs(states[chunk]) for each, states in models]
