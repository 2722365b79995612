"""The training loop: plain PyTorch, one rank of `world_size`, handed everything it needs.

Promise: an optimizer step minimizes (sum of the weighted losses over the global batch) / (its number of targets),
whatever the micro-batch and the number of ranks; data order, learning rate and random numbers are functions of the
step, so that a run that goes on from a snapshot ends with the very weights of one that was never disturbed (bit for
bit on the CPU with the same ranks). Nothing waits for the device within a step.

Does not: import Ray, choose resources, or save the final model.
"""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from stages.contract import Reporter
from stages.errors import StageFailed
from stages.runtime.translation import within_memory
from stages.train.batches import StepBatch
from stages.train.forward import LossSum
from stages.train.optimizer import Recipe, build_optimizer, load_state_tensors, state_tensors
from stages.train.reader import Reader

logger = logging.getLogger(__name__)

CURVE_POINTS = 40
"""Points of a run's curves; the loss is read from the device only there."""


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
        """Return whether it is time for one."""

    def keep(self, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Write one."""


@dataclass(slots=True)
class Training:
    """One rank's training of one model."""

    model: Any
    """A causal language model on this rank's device, float32 weights."""
    reader: Reader
    loss: LossSum
    recipe: Recipe
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
                self._report(progress, speed, total)
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
                    loss, parts = self.loss.of(network, micro_batch.to(self.ranks.device))
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
        return {f"train/{name}": mean for name, mean in zip(self.loss.names, means, strict=True)}

    def _report(self, progress: Progress, tokens_per_second: float, total: int) -> None:
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
