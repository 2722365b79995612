"""Score one causal language model on packed rows: cross-entropy, divergence from references, top-1 agreement.

A reference's distributions are kept as what goes into its output layer (D numbers for each token, not V), together
with that layer; log-probabilities are computed anew for some tokens at a time. A 4096-wide model with 128k words
thereby takes 8 KB for each token instead of 513 KB, and memory does not grow with the vocabulary or the text.

Promises: exact, over the whole vocabulary, in float32; sums over documents in float64; for each target token its
document gets the token's figures. Does not: mask attention between documents of a row (they were packed, and the
models trained, without).

Shapes: B rows, T tokens of a row, N targets in a batch, D model width, V vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from stages.errors import StageFailed
from stages.evaluate.rows import Batch
from stages.ops.divergences import kl_divergence
from stages.runtime.translation import within_memory

__all__ = ["DocumentSums", "Head", "Reference", "kept_from", "kept_to", "output_layer", "score_batches"]

CHUNK_BYTES = 256 * 1024 * 1024
"""Memory for the log-probabilities of one chunk of tokens; about six `[N, V]` float32 tensors live at once."""
HEAD_TOLERANCE = 0.02
"""Largest mean difference between our logits and the model's own, in standard deviations of its logits. Measured on
CPU: 0 in float32 and bfloat16; a forgotten scale or soft cap makes more than 0.6. Leaves room for rounding by shape."""


@dataclass(frozen=True, slots=True)
class Head:
    """A model's output layer: from hidden states to log-probabilities."""

    layer: Callable[[torch.Tensor], torch.Tensor]
    scale: float = 1.0
    """Factor on the logits (Cohere's `logit_scale`, the inverse of Granite's `logits_scaling`)."""
    softcap: float | None = None
    """Logits are squeezed into ± this by tanh (Gemma's `final_logit_softcapping`)."""

    def logits(self, states_ND: torch.Tensor) -> torch.Tensor:
        """Return logits `[N, V]` in the states' dtype, padded words included."""
        logits_NV = self.layer(states_ND)
        if self.scale != 1.0:
            logits_NV = logits_NV * self.scale
        if self.softcap is not None:
            logits_NV = torch.tanh(logits_NV / self.softcap) * self.softcap
        return logits_NV

    def log_probs(self, states_ND: torch.Tensor, vocabulary_size: int) -> torch.Tensor:
        """Return float32 log-probabilities `[N, vocabulary_size]`; words beyond it are padding and are cut off."""
        return self.logits(states_ND)[:, :vocabulary_size].float().log_softmax(-1)


@dataclass(frozen=True, slots=True)
class Reference:
    """A distribution to compare with: an output layer, and the states that go into it, batch by batch."""

    head: Head
    states: Iterator[torch.Tensor]


@dataclass(slots=True)
class DocumentSums:
    """Sums over the targets of each document, by column: `tokens`, `nll`, and for each reference `kl/…`, `agree/…`."""

    sums: dict[int, dict[str, float]] = field(default_factory=dict)

    def add(self, documents_N: NDArray[np.int64], figures: Mapping[str, NDArray[np.float64]]) -> None:
        """Add the figures of a batch's targets to their documents."""
        documents, index_N = np.unique(documents_N, return_inverse=True)
        columns = {name: np.bincount(index_N, weights=values_N) for name, values_N in figures.items()}
        for position, document in enumerate(documents.tolist()):
            row = self.sums.setdefault(document, dict.fromkeys(columns, 0.0))
            for name, values in columns.items():
                row[name] += float(values[position])

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return `document_id` and each column as arrays, sorted by document."""
        documents = sorted(self.sums)
        columns = self.sums[documents[0]] if documents else {}
        found: dict[str, NDArray[Any]] = {"document_id": np.array(documents, dtype=np.int64)}
        for name in columns:
            found[name] = np.array([self.sums[document][name] for document in documents], dtype=np.float64)
        return found


def output_layer(model: Any) -> Head:
    """Return a loaded model's output layer, and check that it is all there is between its states and its logits.

    The check runs one short forward pass, which also makes a compressed checkpoint unpack its weights.

    Raises:
        StageFailed: the model's own logits are others.
    """
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    head = Head(model.get_output_embeddings(), scale, getattr(config, "final_logit_softcapping", None))
    probe = torch.arange(8, device=model.device)[None]
    with torch.inference_mode():
        expected = model(input_ids=probe, use_cache=False).logits[0].float()
        found = head.logits(hidden_states(model, probe)[0]).float()
    if expected.shape != found.shape or (expected - found).abs().mean() > HEAD_TOLERANCE * expected.std():
        raise StageFailed(
            f"{type(model).__name__} does something to its logits that is not known here (its output layer gives other "
            "ones); expected a plain output layer with `logit_scale`, `logits_scaling` or `final_logit_softcapping`"
        )
    return head


def hidden_states(model: Any, input_ids_BT: torch.Tensor) -> torch.Tensor:
    """Return what goes into a model's output layer: `[B, T, D]`."""
    states_BTD: torch.Tensor = model.base_model(input_ids=input_ids_BT, use_cache=False).last_hidden_state
    return states_BTD


def score_batches(
    model: Any,
    head: Head,
    batches: Iterable[Batch],
    *,
    vocabulary_size: int,
    references: Mapping[str, Reference],
    sums: DocumentSums,
    name: str,
) -> Iterator[torch.Tensor]:
    """Score a model batch by batch, adding to `sums`; yield each batch's states `[N, D]`, for use as a reference.

    Args:
        model: a loaded causal language model, in evaluation mode.
        head: its output layer.
        batches: packed rows.
        vocabulary_size: words of the dataset's tokenizer.
        references: what to compare with, by column suffix; their states must come from the same batches.
        sums: takes the figures.
        name: the model's name, for errors.

    Raises:
        StageFailed: a figure is not finite.
        OutOfMemory: the device's memory did not suffice.
    """
    for batch in batches:
        with within_memory(f"scoring {name!r}", micro_batch=len(batch.input_ids_BT)), torch.inference_mode():
            input_ids_BT = torch.as_tensor(batch.input_ids_BT, device=model.device).long()
            is_target_BT = torch.as_tensor(batch.loss_mask_BT[:, 1:].copy(), device=model.device)
            states_ND = hidden_states(model, input_ids_BT)[:, :-1][is_target_BT]
            targets_N = input_ids_BT[:, 1:][is_target_BT]
            others = {key: (ref.head, next(ref.states).to(states_ND.device)) for key, ref in references.items()}
            figures = _compare(head, states_ND, targets_N, others, vocabulary_size)
        for column, values_N in figures.items():
            if not np.isfinite(values_N).all():
                num_bad = int((~np.isfinite(values_N)).sum())
                raise StageFailed(
                    f"{name!r} gives a {column.partition('/')[0]} that is not finite for {num_bad} of {len(values_N)} "
                    "tokens; expected finite numbers: its weights are broken, or its dtype has too small a range"
                )
        sums.add(batch.document_ids_BT[:, 1:][batch.loss_mask_BT[:, 1:]], figures)
        yield states_ND


def _compare(
    head: Head,
    states_ND: torch.Tensor,
    targets_N: torch.Tensor,
    references: Mapping[str, tuple[Head, torch.Tensor]],
    vocabulary_size: int,
) -> dict[str, NDArray[np.float64]]:
    """Return the figures of each target, some tokens at a time. KL is KL(reference ‖ model), in nats."""
    size = max(1, CHUNK_BYTES // (vocabulary_size * 4 * 6))
    parts: dict[str, list[torch.Tensor]] = {}
    for start in range(0, len(states_ND), size):
        chunk = slice(start, start + size)
        log_q_NV = head.log_probs(states_ND[chunk], vocabulary_size)
        nll_N = -log_q_NV.gather(-1, targets_N[chunk, None])[:, 0]
        found = {"tokens": torch.ones_like(nll_N), "nll": nll_N}
        for key, (reference, reference_ND) in references.items():
            log_p_NV = reference.log_probs(reference_ND[chunk], vocabulary_size)
            found[f"kl/{key}"] = kl_divergence(log_p_NV, log_q_NV)
            found[f"agree/{key}"] = log_p_NV.argmax(-1) == log_q_NV.argmax(-1)
        for column, values_N in found.items():
            parts.setdefault(column, []).append(values_N.double().cpu())
    return {column: torch.cat(values).numpy() for column, values in parts.items()}


def kept_from(states: torch.Tensor) -> NDArray[Any]:
    """Return a tensor as an array that travels without a copy; 16-bit floats as their bits (numpy has no bfloat16)."""
    states = states.detach().cpu().contiguous()
    return (states.view(torch.int16) if states.dtype.itemsize == 2 else states).numpy()


def kept_to(array: NDArray[Any], dtype: torch.dtype) -> torch.Tensor:
    """Return the tensor that `kept_from` was given."""
    return torch.from_numpy(np.array(array)).view(dtype)


def stored_head(arrays: Mapping[str, Any], dtype: torch.dtype, device: str) -> Head:
    """Return the output layer that `store_head` wrote."""
    weight_VD = kept_to(arrays["weight"], dtype).to(device)
    bias_V = None if arrays["bias"] is None else kept_to(arrays["bias"], dtype).to(device)
    return Head(lambda states_ND: F.linear(states_ND, weight_VD, bias_V), arrays["scale"], arrays["softcap"])


def store_head(head: Head) -> dict[str, Any]:
    """Return an output layer as plain arrays and numbers, which another process can be handed."""
    layer: Any = head.layer
    bias = getattr(layer, "bias", None)
    return {
        "weight": kept_from(layer.weight),
        "bias": None if bias is None else kept_from(bias),
        "scale": head.scale,
        "softcap": head.softcap,
    }
