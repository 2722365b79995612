"""The training loop: plain PyTorch, one rank of `world_size`, handed everything it needs.

Promise: an optimizer step minimizes (sum of the weighted losses over the global batch) / (its number of targets),
whatever the micro-batch and the number of ranks; data order, learning rate and random numbers are functions of the
step, so that a run that goes on from a snapshot ends with the very weights of one that was never disturbed (bit for
bit on the CPU with the same ranks). A step whose gradient is not finite changes nothing and is counted; whether it is
finite is the one number that a step reads from the device.

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
from stages.train.optimizer import build_optimizers, load_state_tensors, set_rates, state_tensors
from stages.train.progress import Progress
from stages.train.reader import Reader
from stages.train.recipe import Recipe, Validation
from stages.train.validation import HeldOutText

logger = logging.getLogger(__name__)

CURVE_POINTS = 40
"""Points of a run's curves; the loss is read from the device only there."""
MAX_SKIPPED_IN_A_ROW = 10
"""Steps without a finite gradient, one after another: after so many the weights themselves are no longer finite."""
BEST = "best/"
"""Prefix of the names of the best weights in a snapshot."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """Which of how many processes this is, and its device."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


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
    held_out: HeldOutText | None = None
    """None where no loss is measured on text that is not trained on."""
    validation: Validation = field(default_factory=Validation)
    """When that is done."""
    keeps_best: bool = False
    """Whether the model ends with the weights that were best there, and not with the last ones."""
    clock: Callable[[], float] = time.monotonic
    _best: dict[str, Tensor] = field(default_factory=dict)

    def run(self, progress: Progress, tensors: Mapping[str, Tensor] | None = None) -> Progress:
        """Do the steps that are left.

        Args:
            progress: what has been done.
            tensors: a snapshot's, where some has.

        Raises:
            StageFailed: too many gradients were not finite; names the step.
            OutOfMemory: the device's memory did not hold a micro-batch.
        """
        optimizers = build_optimizers(self.model, self.recipe)
        if tensors is not None:
            load_state_tensors(self.model, optimizers, tensors)
            self._best = {name.removeprefix(BEST): t for name, t in tensors.items() if name.startswith(BEST)}
        self.model.train()
        network = self._replicated()
        total = progress.step if progress.is_stopped else self.recipe.optimizer_steps
        every = max(1, total // CURVE_POINTS)
        started, before = self.clock(), progress.seconds
        since_point = (started, progress.tokens)
        if not progress.step:  # the weights that it starts from may be the best
            self._validate(progress)
            started, since_point = self.clock(), (self.clock(), progress.tokens)
        for step, batch in enumerate(self.reader.steps(progress.step, total), progress.step):
            sums, norm = self._step(network, optimizers, batch, step)
            self._count(progress, batch, sums, norm)
            progress.seconds = before + self.clock() - started
            if (step + 1) % every == 0 or step + 1 == total:
                progress.last = self._point(progress) or progress.last
                now = self.clock()  # reading the losses has waited for the device
                speed = (progress.tokens - since_point[1]) / max(now - since_point[0], 1e-9)
                self._report(progress, speed, norm)
                progress.pending, since_point = [], (now, progress.tokens)
            paused = self._validate(progress)
            started, since_point = started + paused, (since_point[0] + paused, since_point[1])
            self._snapshot(optimizers, progress, final=progress.is_stopped or step + 1 == total)
            if progress.is_stopped:
                break
        if self.keeps_best and not self.ranks.rank:
            self._restore_best(progress)
        return progress

    def _restore_best(self, progress: Progress) -> None:
        if not self._best:
            raise StageFailed(
                f"the loss on held-out text is {progress.held_out}, and was never a finite number; look at the "
                "calibration split, or set keep='last'"
            )
        self.model.load_state_dict(self._best, strict=False)  # names no tied tensors and no buffers
        if not progress.best_step:
            self.reporter.note(
                f"no step lowered the loss on held-out text ({progress.best_held_out:.4f} nats): the weights that it "
                "started from are kept; lower the learning rate, or give more text"
            )

    def _replicated(self) -> Any:
        if self.ranks.world_size == 1:
            return self.model
        # Buffers are alike on all ranks. Sent at each forward pass, as by default, they would be waited for by ranks
        # that have fewer passes, where each segment is one: their rows hold segments of other lengths.
        return nn.parallel.DistributedDataParallel(self.model, gradient_as_bucket_view=True, broadcast_buffers=False)

    def _step(
        self, network: Any, optimizers: Sequence[torch.optim.Optimizer], batch: StepBatch, step: int
    ) -> tuple[Tensor, float]:
        """Do one optimizer step, or none where the gradient is not finite.

        Returns:
            the sums of losses over all ranks, still on the device, and the gradient's norm.
        """
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
        # The gradient is the same on every rank, so that all of them decide alike.
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.gradient_clip or math.inf))
        if math.isfinite(norm):
            set_rates(optimizers, self.recipe.rate_fraction_at(step))
            for optimizer in optimizers:
                optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        assert sums is not None, "every rank has rows: the stage checks it"
        sums = sums.double()
        if self.ranks.world_size > 1:
            torch.distributed.all_reduce(sums)
        return sums, norm

    def _count(self, progress: Progress, batch: StepBatch, sums: Tensor, norm: float) -> None:
        """Count a step, and refuse to go on where too many were skipped."""
        step, progress.step = progress.step, progress.step + 1
        progress.tokens += batch.num_tokens
        if math.isfinite(norm):
            progress.targets, progress.skipped_in_a_row = progress.targets + batch.num_targets, 0
            progress.pending.append((step, batch.num_targets, sums))
            return
        progress.skipped, progress.skipped_in_a_row = progress.skipped + 1, progress.skipped_in_a_row + 1
        logger.info("deciding to skip optimizer step %d, since the gradient's norm is %s", step, norm)
        allowed = int(self.recipe.max_skipped_fraction * self.recipe.optimizer_steps)
        in_a_row = min(MAX_SKIPPED_IN_A_ROW, self.recipe.optimizer_steps)
        if progress.skipped > allowed or progress.skipped_in_a_row >= in_a_row:
            raise StageFailed(
                f"the loss is {float(sums[0]) / max(1, batch.num_targets):g} and the gradient's norm {norm:g} at "
                f"optimizer step {step}, expected finite numbers; {progress.skipped} such steps were skipped so far "
                f"({progress.skipped_in_a_row} in a row), expected at most {allowed}; lower the "
                f"optimizer's learning_rate (now {self.recipe.optimizer.learning_rate:g}), set gradient_clip, or look "
                "for weights that are not finite in the checkpoint that the student comes from"
            )

    def _point(self, progress: Progress) -> dict[str, float]:
        """Return means over the steps since the last point; none where all of them were skipped."""
        pending = progress.pending
        if not pending:
            return {}
        sums = torch.stack([torch.as_tensor(s, dtype=torch.float64, device=self.ranks.device) for _, _, s in pending])
        means = (sums.sum(0) / max(1, sum(targets for _, targets, _ in pending))).tolist()
        return {f"train/{name}": mean for name, mean in zip(self.loss.names, means, strict=True)}

    def _report(self, progress: Progress, tokens_per_second: float, gradient_norm: float) -> None:
        if self.ranks.rank:
            return
        rate = self.recipe.optimizer.learning_rate * self.recipe.rate_fraction_at(progress.step - 1)
        extra = {"train/learning_rate": rate, "train/tokens_per_second": tokens_per_second}
        if math.isfinite(gradient_norm):
            extra["train/gradient_norm"] = gradient_norm
        if progress.skipped:
            extra["train/skipped_steps"] = progress.skipped
        self.reporter.curve(progress.step, {**progress.last, **extra})
        self.reporter.progress(progress.step, self.recipe.optimizer_steps, "steps")

    def _validate(self, progress: Progress) -> float:
        """Measure the loss on held-out text where it is time for it; keep weights that are the best there.

        Returns:
            the seconds that it took.
        """
        total = self.recipe.optimizer_steps
        every = max(1, -(-total // self.validation.times))
        if self.held_out is None or not (progress.step % every == 0 or progress.step == total):
            return 0.0
        started = self.clock()
        found = self.held_out.cross_entropy(self.model, self.ranks.device)
        is_best = progress.count_validation(found, patience=self.validation.patience)
        if self.ranks.rank:
            return self.clock() - started
        if is_best and self.keeps_best:
            self._best = {name: p.detach().to("cpu", copy=True) for name, p in self.model.named_parameters()}
        self.reporter.curve(progress.step, {"validation/cross_entropy": found})
        if progress.is_stopped:
            self.reporter.note(
                f"stopped after {progress.step} of {total} steps: no lower loss on held-out text than "
                f"{progress.best_held_out:.4f} nats, of step {progress.best_step}, {progress.times_without_best} times"
            )
        return self.clock() - started

    def _snapshot(self, optimizers: Sequence[torch.optim.Optimizer], progress: Progress, *, final: bool) -> None:
        if self.snapshot_writer is None or not (final or self.snapshot_writer.due()):
            return
        finite = torch.stack([p.detach().isfinite().all() for p in self.model.parameters()]).all()
        if not finite:  # the steps that follow are skipped, and end it; a snapshot would repeat that for ever
            return
        tensors = state_tensors(self.model, optimizers)
        best = {f"{BEST}{name}": tensor for name, tensor in self._best.items()}
        self.snapshot_writer.keep(progress.step, {**tensors, **best}, progress.facts())
