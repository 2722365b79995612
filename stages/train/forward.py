"""One micro-batch: the student's forward pass, a live teacher's where an objective asks one, and the sums of losses.

Promise: logits beyond the dataset's vocabulary are cut off before any softmax, the teacher's too; a teacher is asked
in inference mode and never changed, and its outputs live as long as one micro-batch; its logits are made from its
states where the loss is computed, a chunk of targets at a time, so that no second [N, V] tensor lies beside the
student's (they are whole only where its head cannot be replayed, see `stages.models.heads`); hidden states are asked
for only where an objective needs them.

Shapes: B rows, T tokens, N = B · T, V vocabulary, D width, M targets, X width of a teacher's states.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stages.models.heads import Head, observe_head
from stages.models.segments import RowOutputs, run_rows
from stages.ops.divergences import chunked_sum
from stages.train.batches import MicroBatch
from stages.train.objectives.loss import Loss, Targets


@dataclass(frozen=True, slots=True)
class TeacherOutputs:
    """What a live teacher says at the targets of a micro-batch."""

    head: Head
    states_MX: Tensor
    """From which `head` makes its logits."""
    hidden_states_MD: tuple[Tensor, ...]
    """Empty where none was asked for."""


class LiveTeacher:
    """A frozen model that is asked as the student trains; its logits are over the dataset's vocabulary."""

    def __init__(self, model: Any, vocabulary: int) -> None:
        self._model = model.requires_grad_(False).eval()
        self._vocabulary = vocabulary
        self._head: Head | None = None

    def outputs(self, batch: MicroBatch, *, hidden_states: bool) -> TeacherOutputs:
        """Return its outputs at the targets of a micro-batch."""
        if self._head is None:
            self._head = observe_head(self._model, batch.input_ids_BT, self._vocabulary)
        with torch.inference_mode():
            states_NX, hidden_ND = self._head.run(
                self._model, batch.input_ids_BT, batch.position_ids_BT, hidden_states=hidden_states
            )
        # Outside of inference mode: autograd takes what is selected here as the constants of a loss.
        states_MX, *hidden_MD = (each.index_select(0, batch.positions_M) for each in (states_NX, *hidden_ND))
        return TeacherOutputs(self._head, states_MX, tuple(hidden_MD))


def student_outputs(
    network: Any,
    batch: MicroBatch,
    dtype: str,
    *,
    whole_rows: bool,
    hidden_states: bool = False,
    router_balance: bool = False,
) -> RowOutputs:
    """Run a student over a micro-batch, in the type that the forward pass computes in; see `run_rows`."""
    with torch.autocast(batch.input_ids_BT.device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
        return run_rows(
            network,
            batch.input_ids_BT,
            batch.position_ids_BT,
            whole=whole_rows,
            hidden_states=hidden_states,
            router_balance=router_balance,
        )


@dataclass(frozen=True, slots=True)
class LossSum:
    """The weighted sum of objectives, over the targets of a micro-batch, and what a model's own build adds to it."""

    objectives: Sequence[Loss]
    vocabulary: int
    """Tokens of the dataset."""
    dtype: str = "float32"
    """What the student's forward pass computes in; losses are float32."""
    teacher: LiveTeacher | None = None
    """None where no objective asks one."""
    is_padded: bool = False
    """Whether the student's head has entries beyond the vocabulary. No objective sees them, and untrained they would
    take part of what is sampled (10 % was seen); −log of the mass that they leave to the vocabulary is added, as
    cross-entropy over all entries has it. So they are trained down, which holds for tied embeddings and in every
    runtime, and leaves the checkpoint's shape as it was."""
    router_weight: float = 0.0
    """Weight of a mixture's own load-balancing loss (arXiv:2101.03961), 0 where it has none. It is a mean over the
    tokens of a micro-batch, so that it alone depends on the micro-batch's size."""
    whole_rows: bool = True
    """Whether the student keeps the segments of a row apart by itself (`stages.models.segments`)."""

    @property
    def names(self) -> list[str]:
        """Names of the sums."""
        own = (("padding", self.is_padded), ("router_balance", self.router_weight))
        return ["loss", *(objective.CURVE for objective in self.objectives), *(name for name, has in own if has)]

    def of(self, network: Any, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Return the weighted sum of losses, and all sums (weighted first, then each objective's own).

        Args:
            network: the student, as it is trained.
            batch: on the network's device.
        """
        hidden = any(objective.NEEDS.hidden_states for objective in self.objectives)
        asked = self.teacher.outputs(batch, hidden_states=hidden) if self.teacher else None
        student = student_outputs(
            network,
            batch,
            self.dtype,
            whole_rows=self.whole_rows,
            hidden_states=hidden,
            router_balance=bool(self.router_weight),
        )

        def term(values: tuple[Tensor, ...], rows: slice) -> tuple[Tensor, ...]:
            seen = self._seen(values, asked, batch, rows)
            parts = [objective.losses(seen).sum() for objective in self.objectives]
            weighted = sum(o.scale * part for o, part in zip(self.objectives, parts, strict=True))
            if self.is_padded:
                parts.append((values[0].logsumexp(1) - seen.logits_NV.logsumexp(1)).sum())
                weighted = weighted + parts[-1]
            return (weighted, *parts)  # type: ignore[arg-type]

        loss, sums = chunked_sum([student.values_NX, *student.hidden_states], batch.positions_M, term)
        if student.router_balance is None:
            return loss, sums
        balance = student.router_balance.float() * len(batch.targets_M)
        added = self.router_weight * balance.detach()
        return loss + self.router_weight * balance, torch.cat([sums[:1] + added, sums[1:], balance.detach()[None]])

    def _seen(
        self, values: tuple[Tensor, ...], asked: TeacherOutputs | None, batch: MicroBatch, rows: slice
    ) -> Targets:
        """Return what objectives see of some targets: the student's values there, and the teacher's beside them."""
        hidden_MD = asked.hidden_states_MD if asked else ()
        return Targets(
            logits_NV=values[0][:, : self.vocabulary],
            tokens_N=batch.targets_M[rows],
            signals=batch.signals.at(rows) if batch.signals else None,
            teacher_logits_NV=asked.head.logits(asked.states_MX[rows]) if asked else None,
            hidden_states_ND=values[1:] or None,
            teacher_hidden_states_ND=tuple(state_MD[rows].float() for state_MD in hidden_MD) or None,
        )
