"""The training loop: plain PyTorch, one rank of `world_size`, handed everything it needs.

Promise: an optimizer step minimizes (sum of the weighted losses over the global batch) / (its number of targets),
whatever the micro-batch and the number of ranks; data order, learning rate and random numbers are functions of the
step, so that a run that goes on from a snapshot ends with the very weights of one that was never disturbed (bit for
bit on the CPU with the same ranks). Nothing waits for the device within a step.

Does not: know Ray, choose resources, or save the final model.

Shapes: B rows, T tokens, V vocabulary, M targets.
"""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from stages.contract import Reporter
from stages.errors import StageFailed
from stages.ops.divergences import chunked_sum
from stages.runtime.translation import within_memory
from stages.train.reader import MicroBatch, Reader, StepBatch

logger = logging.getLogger(__name__)

CURVE_POINTS = 40
"""Points of a run's curves; the loss is read from the device only there."""
BETAS = (0.9, 0.95)
"""AdamW's decay rates: those in use for language models since GPT-3 (arXiv:2005.14165, B)."""


class Loss(Protocol):
    """What the loop asks of an objective."""

    CURVE: ClassVar[str]

    @property
    def scale(self) -> float:
        """Factor of the sum of `losses` in the total loss."""

    def losses(self, logits_NV: Tensor, batch: MicroBatch, rows: slice) -> Tensor:
        """Return the loss of each token."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the weights are moved."""

    optimizer_steps: int
    learning_rate: float
    warmup_fraction: float
    final_fraction: float
    weight_decay: float
    gradient_clip: float
    dtype: str
    seed: int

    def learning_rate_at(self, step: int) -> float:
        """Return the rate of a step: a linear warm-up, then a cosine down to `final_fraction` of the peak."""
        warmup = math.ceil(self.warmup_fraction * self.optimizer_steps)
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        done = (step - warmup) / max(1, self.optimizer_steps - 1 - warmup)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        return self.learning_rate * (self.final_fraction + (1 - self.final_fraction) * cosine)


@dataclass(frozen=True, slots=True)
class Ranks:
    """Which of how many processes this is, and its device."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


@dataclass(slots=True)
class Progress:
    """What has been done so far; goes into snapshots."""

    step: int = 0
    targets: int = 0
    tokens: int = 0
    seconds: float = 0.0
    last: dict[str, float] = field(default_factory=dict)
    """The newest point of the curves."""
    pending: list[tuple[int, int, Tensor | list[float]]] = field(default_factory=list)
    """(step, targets, sums of losses over all ranks) of each step since that point; of a snapshot as plain numbers."""


class SnapshotSink(Protocol):
    """Where the loop leaves snapshots."""

    def due(self) -> bool:
        """Tell whether it is time for one."""

    def keep(self, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Write one."""


def build_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """Return a fused AdamW; vectors (norms, biases) are not decayed."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=BETAS, fused=True)


def state_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return weights and the optimizer's state by name."""
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        found[f"weights/{name}"] = parameter
        for key, value in optimizer.state.get(parameter, {}).items():
            found[f"{key}/{name}"] = value
    return found


def load_state_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put a snapshot's tensors back."""
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            parameter.copy_(tensors[f"weights/{name}"])
        for key in ("step", "exp_avg", "exp_avg_sq"):
            if f"{key}/{name}" in tensors:
                optimizer.state[parameter][key] = tensors[f"{key}/{name}"].to(parameter.device)


@dataclass(slots=True)
class Training:
    """One rank's training of one model."""

    model: Any
    """A causal language model on this rank's device, float32 weights."""
    reader: Reader
    objectives: Sequence[Loss]
    recipe: Recipe
    vocabulary: int
    """Logits beyond the dataset's vocabulary are cut off before any softmax."""
    reporter: Reporter
    ranks: Ranks = field(default_factory=Ranks)
    snapshot_writer: SnapshotSink | None = None
    """None on all ranks but the first."""
    clock: Callable[[], float] = time.monotonic

    def run(self, progress: Progress, tensors: Mapping[str, Tensor] | None = None) -> Progress:
        """Do the steps that are left.

        Args:
            progress: what has been done.
            tensors: a snapshot's, where some has.

        Raises:
            StageFailed: the loss became NaN or infinite; names the step.
            OutOfMemory: the device's memory did not hold a micro-batch.
        """
        optimizer = build_optimizer(self.model, self.recipe)
        if tensors is not None:
            load_state_tensors(self.model, optimizer, tensors)
        self.model.train()
        network = self._replicated()
        total = self.recipe.optimizer_steps
        every = max(1, total // CURVE_POINTS)
        started, before = self.clock(), progress.seconds
        since_point = (started, progress.tokens)
        for step, batch in enumerate(self.reader.steps(progress.step, total), progress.step):
            sums = self._step(network, optimizer, batch, step)
            progress.pending.append((step, batch.num_targets, sums))
            now = self.clock()
            progress.step, progress.targets = step + 1, progress.targets + batch.num_targets
            progress.tokens, progress.seconds = progress.tokens + batch.num_tokens, before + now - started
            if (step + 1) % every == 0 or step + 1 == total:
                progress.last = self._point(progress.pending)
                now = self.clock()  # reading the losses has waited for the device
                speed = (progress.tokens - since_point[1]) / max(now - since_point[0], 1e-9)
                self._tell(progress, speed, total)
                progress.pending, since_point = [], (now, progress.tokens)
            self._snapshot(optimizer, progress, final=step + 1 == total)
        return progress

    def _replicated(self) -> Any:
        if self.ranks.world_size == 1:
            return self.model
        return nn.parallel.DistributedDataParallel(self.model, gradient_as_bucket_view=True)

    def _step(self, network: Any, optimizer: torch.optim.Optimizer, batch: StepBatch, step: int) -> Tensor:
        """Do one optimizer step; return the sums of losses over all ranks, still on the device."""
        torch.manual_seed(hash((self.recipe.seed, step, self.ranks.rank)) % 2**63)  # dropout, where a model has any
        # DDP averages over ranks, and what is wanted is the sum.
        factor = self.ranks.world_size / max(1, batch.num_targets)
        sums: Tensor | None = None
        rows = len(batch.micro_batches[0].input_ids_BT)
        with within_memory(f"training at step {step}", micro_batch=rows):
            for index, micro_batch in enumerate(batch.micro_batches, 1):
                last = index == len(batch.micro_batches)
                alone = contextlib.nullcontext() if last or self.ranks.world_size == 1 else network.no_sync()
                with alone:
                    loss, parts = self._loss(network, micro_batch.to(self.ranks.device))
                    torch.autograd.backward(loss * factor)
                sums = parts if sums is None else sums + parts
        if self.recipe.gradient_clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.gradient_clip)
        for group in optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate_at(step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        assert sums is not None, "every rank has rows: the stage checks it"
        sums = sums.double()
        if self.ranks.world_size > 1:
            torch.distributed.all_reduce(sums)
        return sums

    def _loss(self, network: Any, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Return the weighted sum of losses of a micro-batch, and all sums (weighted first)."""

        def term(logits_NV: Tensor, rows: slice) -> tuple[Tensor, ...]:
            shared = logits_NV[:, : self.vocabulary]
            parts = [objective.losses(shared, batch, rows).sum() for objective in self.objectives]
            weighted = sum(o.scale * part for o, part in zip(self.objectives, parts, strict=True))
            return (weighted, *parts)  # type: ignore[arg-type]

        device = self.ranks.device.type
        with torch.autocast(device, dtype=torch.bfloat16, enabled=self.recipe.dtype == "bfloat16"):
            logits = network(input_ids=batch.input_ids_BT, use_cache=False).logits
        sums: tuple[Tensor, Tensor] = chunked_sum(logits.flatten(0, 1), batch.positions_M, term)
        return sums

    def _point(self, pending: Sequence[tuple[int, int, Tensor | list[float]]]) -> dict[str, float]:
        """Return means over the steps since the last point; the one place that waits for the device."""
        sums = torch.stack([torch.as_tensor(s, dtype=torch.float64, device=self.ranks.device) for _, _, s in pending])
        for (step, _, _), row in zip(pending, sums.tolist(), strict=True):
            if not all(map(math.isfinite, row)):
                raise StageFailed(
                    f"the loss is {row[0]} at optimizer step {step}, expected a finite number; "
                    f"lower learning_rate (now {self.recipe.learning_rate:g}) or set gradient_clip"
                )
        means = (sums.sum(0) / max(1, sum(targets for _, targets, _ in pending))).tolist()
        names = ["loss", *(objective.CURVE for objective in self.objectives)]
        return {f"train/{name}": mean for name, mean in zip(names, means, strict=True)}

    def _tell(self, progress: Progress, tokens_per_second: float, total: int) -> None:
        if self.ranks.rank:
            return
        rate = self.recipe.learning_rate_at(progress.step - 1)
        extra = {"train/learning_rate": rate, "train/tokens_per_second": tokens_per_second}
        self.reporter.curve(progress.step, {**progress.last, **extra})
        self.reporter.progress(progress.step, total, "steps")

    def _snapshot(self, optimizer: torch.optim.Optimizer, progress: Progress, *, final: bool) -> None:
        if self.snapshot_writer is None or not (final or self.snapshot_writer.due()):
            return
        finite = torch.stack([p.detach().isfinite().all() for p in self.model.parameters()]).all()
        if not finite:  # the next reading of the losses names the step; a snapshot would repeat it for ever
            return
        facts = {
            "targets": progress.targets,
            "tokens": progress.tokens,
            "seconds": progress.seconds,
            "last": progress.last,
            "pending": [
                (step, targets, torch.as_tensor(s, dtype=torch.float64).tolist())
                for step, targets, s in progress.pending
            ],
        }
        self.snapshot_writer.keep(progress.step, state_tensors(self.model, optimizer), facts)
