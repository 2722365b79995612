"""Score one causal language model on packed rows: cross-entropy, divergence from references, top-1 agreement.

A reference's distributions are kept as its states and its output head (`stages.models.heads`); log-probabilities are
computed anew for some tokens at a time. A state of a 4,096-wide model with a vocabulary of 128k is 8 KB in bfloat16
instead of 256 KB of logits. Where a head cannot be replayed the logits are kept all the same, in the model's dtype: V
numbers for each token, in Ray's object store, which spills to disk; `Evaluate.max_rows` bounds them.

Promises: exact, over the dataset's whole vocabulary, in float32; sums over documents in float64; for each target token
its document gets the token's figures; each segment of a row is run as if it were alone (`stages.models.segments`).

Shapes: B rows, T tokens of a row, N targets in a batch, X width of a state, V vocabulary of the dataset.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from stages.errors import StageFailed
from stages.formats.tokens import TokenRows, predicts
from stages.models.heads import Head, log_prob_chunks
from stages.ops.divergences import kl_divergence
from stages.runtime.translation import within_memory

__all__ = ["DocumentSums", "NoiseFloor", "Reference", "score_batches"]

FLOOR_TOKENS = 65_536
"""Targets on which the noise floor is measured: more would not change what is shown of it."""


@dataclass(frozen=True, slots=True)
class Reference:
    """A distribution to compare with: an output head, and its states, batch by batch."""

    head: Head
    states: Iterator[torch.Tensor]


@dataclass(slots=True)
class NoiseFloor:
    """A model against itself, run again in batches of half the rows: what rounding alone makes of a difference.

    Sums over targets, at most some more than `FLOOR_TOKENS`.
    """

    sums: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("tokens", "nll", "kl/self", "agree/self"), 0))

    @property
    def is_measured(self) -> bool:
        """Whether no more targets are needed."""
        return self.sums["tokens"] >= FLOOR_TOKENS

    def add(self, figures: Mapping[str, NDArray[np.float64]]) -> None:
        """Add the figures of a batch's targets."""
        for column, values_N in figures.items():
            self.sums[column] += float(values_N.sum())


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


def score_batches(
    model: Any,
    head: Head,
    batches: Iterable[TokenRows],
    *,
    references: Mapping[str, Reference],
    sums: DocumentSums,
    name: str,
    floor: NoiseFloor | None = None,
) -> Iterator[torch.Tensor]:
    """Score a model batch by batch, adding to `sums`; yield each batch's states `[N, X]`, for use as a reference.

    Args:
        model: a loaded causal language model, in evaluation mode.
        head: its output head, over the dataset's vocabulary.
        batches: packed rows.
        references: what to compare with, by column suffix; their states must come from the same batches.
        sums: takes the figures.
        name: the model's name, for errors.
        floor: takes the model's figures against itself, where those are wanted.

    Raises:
        StageFailed: a figure is not finite.
        OutOfMemory: the device's memory did not suffice.
    """
    for batch in batches:
        predicts_BT = predicts(batch.mask_RT)
        with within_memory(f"scoring {name!r}", micro_batch=len(batch)), torch.inference_mode():
            input_ids_BT = torch.as_tensor(batch.ids_RT, device=model.device).long()
            chosen_BT = torch.as_tensor(predicts_BT, device=model.device)
            positions_BT = torch.as_tensor(batch.positions_RT, device=model.device)
            states_NX = head.states(model, input_ids_BT, positions_BT, chosen_BT)
            targets_N = input_ids_BT.roll(-1, dims=1)[chosen_BT]
            others = {key: (ref.head, next(ref.states).to(states_NX.device)) for key, ref in references.items()}
            figures = _compare(head, states_NX, targets_N, others)
            if floor is not None and not floor.is_measured:
                again_NX = torch.cat(
                    [head.states(model, *part) for part in _halves(input_ids_BT, positions_BT, chosen_BT)]
                )
                floor.add(_compare(head, again_NX[: len(states_NX)], targets_N, {"self": (head, states_NX)}))
        for column, values_N in figures.items():
            if not np.isfinite(values_N).all():
                num_bad = int((~np.isfinite(values_N)).sum())
                raise StageFailed(
                    f"{name!r} gives a {column.partition('/')[0]} that is not finite for {num_bad} of {len(values_N)} "
                    "tokens; expected finite numbers: its weights are broken, or its dtype has too small a range"
                )
        sums.add(np.roll(batch.document_ids_RT, -1, axis=1)[predicts_BT], figures)
        yield states_NX


def _halves(*tensors_BT: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """Return the upper and the lower rows of tensors; of a single row itself twice as one batch."""
    if len(tensors_BT[0]) == 1:
        return [tuple(tensor.repeat(2, 1) for tensor in tensors_BT)]
    return list(zip(*(tensor.chunk(2) for tensor in tensors_BT), strict=True))


def _compare(
    head: Head, states_NX: torch.Tensor, targets_N: torch.Tensor, references: Mapping[str, tuple[Head, torch.Tensor]]
) -> dict[str, NDArray[np.float64]]:
    """Return the figures of each target. KL is KL(reference ‖ model), in nats.

    Two models agree where they share a likeliest token: numbers of 16 bits tie.
    """
    parts: dict[str, list[torch.Tensor]] = {}
    for chunk, (log_q_NV, *others) in log_prob_chunks((head, states_NX), *references.values()):
        nll_N = -log_q_NV.gather(-1, targets_N[chunk, None])[:, 0]
        found = {"tokens": torch.ones_like(nll_N), "nll": nll_N}
        for key, log_p_NV in zip(references, others, strict=True):
            found[f"kl/{key}"] = kl_divergence(log_p_NV, log_q_NV)
            found[f"agree/{key}"] = (_is_top(log_p_NV) & _is_top(log_q_NV)).any(-1)
        for column, values_N in found.items():
            parts.setdefault(column, []).append(values_N.double().cpu())
    return {column: torch.cat(values).numpy() for column, values in parts.items()}


def _is_top(log_p_NV: torch.Tensor) -> torch.Tensor:
    return log_p_NV == log_p_NV.amax(-1, keepdim=True)
