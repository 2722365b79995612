"""One micro-batch: the student's forward pass, a live teacher's where an objective asks one, and the sums of losses.

Promise: logits beyond the dataset's vocabulary are cut off before any softmax, the teacher's too; a teacher is asked
in inference mode and never changed, and its outputs live as long as one micro-batch; hidden states are asked for only
where an objective needs them.

Shapes: B rows, T tokens, N = B · T, V vocabulary, D width, M targets.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stages.ops.divergences import chunked_sum
from stages.train.batches import MicroBatch
from stages.train.objectives.loss import Loss, Targets


@dataclass(frozen=True, slots=True)
class Outputs:
    """What a model returns for a micro-batch."""

    logits_NV: Tensor
    hidden_states_ND: tuple[Tensor, ...]
    """The embeddings, then each layer's output; empty where none was asked for."""


class LiveTeacher:
    """A frozen model that is asked as the student trains."""

    def __init__(self, model: Any) -> None:
        self._model = model.requires_grad_(False).eval()

    @torch.inference_mode()
    def outputs(self, input_ids_BT: Tensor, *, hidden_states: bool) -> Outputs:
        """Return its outputs for rows of tokens."""
        return run_model(self._model, input_ids_BT, hidden_states=hidden_states)


def run_model(model: Any, input_ids_BT: Tensor, *, hidden_states: bool) -> Outputs:
    """Run a model over rows of tokens."""
    found = model(input_ids=input_ids_BT, use_cache=False, output_hidden_states=hidden_states)
    states = found.hidden_states if hidden_states else ()
    return Outputs(found.logits.flatten(0, 1), tuple(state.flatten(0, 1) for state in states))


@dataclass(frozen=True, slots=True)
class LossSum:
    """The weighted sum of objectives, over the targets of a micro-batch."""

    objectives: Sequence[Loss]
    vocabulary: int
    """Tokens of the dataset."""
    dtype: str = "float32"
    """What the student's forward pass computes in; losses are float32."""
    teacher: LiveTeacher | None = None
    """None where no objective asks one."""

    @property
    def names(self) -> list[str]:
        """Names of the sums."""
        return ["loss", *(objective.CURVE for objective in self.objectives)]

    def of(self, network: Any, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Return the weighted sum of losses, and all sums (weighted first, then each objective's own).

        Args:
            network: the student, as it is trained.
            batch: on the network's device.
        """
        hidden = any(objective.NEEDS.hidden_states for objective in self.objectives)
        asked = self.teacher.outputs(batch.input_ids_BT, hidden_states=hidden) if self.teacher else None
        device = batch.input_ids_BT.device.type
        with torch.autocast(device, dtype=torch.bfloat16, enabled=self.dtype == "bfloat16"):
            student = run_model(network, batch.input_ids_BT, hidden_states=hidden)

        def term(values: tuple[Tensor, ...], rows: slice) -> tuple[Tensor, ...]:
            seen = self._seen(values, asked, batch, rows)
            parts = [objective.losses(seen).sum() for objective in self.objectives]
            weighted = sum(o.scale * part for o, part in zip(self.objectives, parts, strict=True))
            return (weighted, *parts)  # type: ignore[arg-type]

        return chunked_sum((student.logits_NV, *student.hidden_states_ND), batch.positions_M, term)

    def _seen(self, values: tuple[Tensor, ...], asked: Outputs | None, batch: MicroBatch, rows: slice) -> Targets:
        """Return what objectives see of some targets: the student's values there, and the teacher's beside them."""

        def beside(whole: Tensor) -> Tensor:
            return whole.index_select(0, batch.positions_M[rows]).float()

        return Targets(
            logits_NV=values[0][:, : self.vocabulary],
            tokens_N=batch.targets_M[rows],
            signals=batch.signals.at(rows) if batch.signals else None,
            teacher_logits_NV=beside(asked.logits_NV)[:, : self.vocabulary] if asked else None,
            hidden_states_ND=values[1:] or None,
            teacher_hidden_states_ND=tuple(map(beside, asked.hidden_states_ND)) or None if asked else None,
        )
