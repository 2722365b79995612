"""A teacher in this process: a transformers model whose forward pass feeds `capture` chunk by chunk.

Promise: signals are those of `model(input_ids).logits`, truncated to the dataset's vocabulary before the softmax.
The full [tokens, vocabulary] logits are never made where the language-model head is a plain linear map of the
backbone's last hidden states; whether it is, is observed on the first batch (soft-capping and logit scales change what
comes out of the head, and some models change what goes in), bit for bit, and such models take the plain path.

Rows are padded on the right only, so that a causal model needs no attention mask.

Shapes: B rows, T tokens, N = B · T, I hidden width, V vocabulary of the dataset.
"""

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stages.teach.capture import Signals, capture, chunk_rows, join

logger = logging.getLogger(__name__)

HEAD_TOKENS = 512
"""Tokens in one product with the head: enough for the product to run at full speed (measured on two CPU cores)."""


@dataclass(slots=True)
class LocalTeacher:
    """A loaded model, and the buffers that its captures share."""

    model: Any
    vocabulary: int
    k: int
    temperatures: tuple[float, ...]
    _plain_head: bool | None = None
    _logits_NV: Tensor | None = None
    _work: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """The device that the model lies on."""
        device: torch.device = self.model.device
        return device

    @torch.inference_mode()
    def signals(self, input_ids_BT: Tensor) -> Signals:
        """Run the teacher over rows of tokens and keep signals of every position, [B · T], on the CPU."""
        ids = input_ids_BT.to(self.device, dtype=torch.long, non_blocking=True)
        if self._plain_head is None:
            self._plain_head = has_plain_head(self.model, ids[:1])
            logger.info("deciding to take %s, since the head is %s", *self._words())
        if not self._plain_head:
            return self._reduce(self.model(input_ids=ids, use_cache=False).logits.flatten(0, 1), None)
        hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        return self._reduce(hidden.flatten(0, 1), self.model.get_output_embeddings())

    def _words(self) -> tuple[str, str]:
        return (
            ("hidden states", "a plain linear map") if self._plain_head else ("whole logits", "not a plain linear map")
        )

    def _reduce(self, states_NX: Tensor, head: nn.Linear | None) -> Signals:
        """Capture chunk by chunk; `states` are hidden states where a head is given, else logits."""
        rows = chunk_rows(self.vocabulary, self.device.type)
        outer = max(rows, HEAD_TOKENS)
        if self._work is None:
            self._work = torch.empty(2, rows, self.vocabulary, device=self.device)
            self._logits_NV = states_NX.new_empty(outer, self.vocabulary) if head is not None else None
        parts = []
        for first in range(0, len(states_NX), outer):
            logits_NV = states_NX[first : first + outer]
            if head is not None:
                logits_NV = self._project(logits_NV, head)
            for start in range(0, len(logits_NV), rows):
                chunk = logits_NV[start : start + rows, : self.vocabulary]
                parts.append(capture(chunk, self.k, self.temperatures, work=self._work))
        found = join(parts)
        return found if self.device.type == "cpu" else _to_cpu(found)

    def _project(self, hidden_NI: Tensor, head: nn.Linear) -> Tensor:
        assert self._logits_NV is not None
        logits_NV = self._logits_NV[: len(hidden_NI)]
        bias: Tensor | None = head.bias
        weight_IV = head.weight[: self.vocabulary].t()
        if bias is None:
            return torch.mm(hidden_NI, weight_IV, out=logits_NV)
        return torch.addmm(bias[: self.vocabulary], hidden_NI, weight_IV, out=logits_NV)


def _to_cpu(signals: Signals) -> Signals:
    return Signals(
        ids_NK=signals.ids_NK.cpu(),
        log_probs_NK=signals.log_probs_NK.cpu(),
        tail_log_mass_N=signals.tail_log_mass_N.cpu(),
        log_partitions_NC=signals.log_partitions_NC.cpu(),
        finite_N=signals.finite_N.cpu(),
    )


@torch.inference_mode()
def has_plain_head(model: Any, input_ids_BT: Tensor) -> bool:
    """Tell whether logits are exactly the head's output, and its input exactly the backbone's last hidden states."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        return False
    seen: dict[str, Tensor] = {}

    def at_head(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen["into"], seen["out"] = inputs[0], output

    def at_backbone(_: nn.Module, __: Any, output: Any) -> None:
        seen["hidden"] = output.last_hidden_state

    hooks = [head.register_forward_hook(at_head), model.base_model.register_forward_hook(at_backbone)]
    try:
        logits = model(input_ids=input_ids_BT, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    if seen.keys() != {"into", "out", "hidden"}:
        return False
    return torch.equal(logits, seen["out"]) and torch.equal(seen["into"], seen["hidden"])
