"""Search quantization schemes for a model: one Ray Tune trial a scheme, then the best reloaded and measured again.

A proposer (`proposers.py`) names the schemes, in rounds: each round's trials run at the same time, and it sees what
they found before it names the next.

Promises: every scheme ends as a row of `search.json`, with its measured KL and its real bytes, or with the reason why
it failed; a plain 16-bit cast is one of them, and no finalist is beaten in both by another scheme, the cast included; a
finalist is one whose files, loaded by plain transformers in a process that did not quantize, have the KL that its trial
measured; an attempt that goes on runs only schemes that have no receipt.
Does not: train, or measure speed.

Tune's own restore is not used: it keeps a search's state on one disk, while receipts live in the store.
"""

import contextlib
import io
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, SerializeAsAny

from stages.contract import Artifact, Context, Input, Kind, Outcome, Stage
from stages.errors import OutOfMemory, StageFailed
from stages.formats.search import FailedTrial, Trial
from stages.models.compatibility import check_planned
from stages.models.serving import RULES, RuntimeChoice
from stages.quantize.finalists import publish
from stages.quantize.imports import import_for_measuring, import_for_quantizing
from stages.quantize.proposers import Grid, Proposer
from stages.quantize.records import (
    Receipt,
    assemble_search,
    check_enough,
    check_lost,
    describe_choice,
    describe_trials,
    final_metrics,
    known_receipts,
    points_of,
    read_receipt,
)
from stages.quantize.schemes import CAST, Scheme
from stages.quantize.selection import TrialPoint, Verification, pareto_front, preference, verify
from stages.quantize.served import find_refused
from stages.runtime.processes import environment
from stages.runtime.workers import WorkerSetup, device_of, fetch_result, remote_task, tune_resources
from stages.storage import File

if TYPE_CHECKING:
    from stages.formats.tokens import TokenRows
    from stages.quantize.job import SearchJob, Survey

logger = logging.getLogger(__name__)

QUIET_TUNE = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
}
"""Tune writes no CSV, JSON or TensorBoard files, and leaves Ctrl+C to whoever runs the step."""


class Quantize(Stage):
    """Try quantization schemes on a model and keep the best of size against KL."""

    KIND: ClassVar[Kind] = "search"
    REVISION: ClassVar[str] = f"2026-11-25 calibration by documents; a faithful finalist; finalists by {RULES}"
    PLACES_WORKERS: ClassVar = True
    INPUTS: ClassVar[Mapping[str, Input]] = {"model": Input(("model",)), "data": Input(("dataset",))}
    FRESH_PROCESS: ClassVar[bool] = True

    proposer: SerializeAsAny[Proposer] = Grid()
    """What is tried, one trial each."""
    calibration_tokens: int = Field(default=128 * 2048, ge=1)
    """Tokens of the calibration split that GPTQ and SmoothQuant see at most; 128 sequences of 2,048 are what
    arXiv:2210.17323 uses."""
    evaluation_tokens: int = Field(default=65_536, ge=1)
    """Tokens of other documents of that split, on which the KL is measured, at most; of a smaller split both are cut
    alike."""
    finalists: int = Field(default=3, ge=1)
    """Checkpoints that are kept: the chosen one and its neighbors in size."""
    max_kl: float = Field(default=0.05, gt=0)
    """Nats per token to the unquantized model that the chosen one may have; 4-bit weights in groups of 128 by round to
    nearest have 0.03 on a small language model."""
    reload_tolerance: float = Field(default=1e-3, gt=0)
    """Nats per token by which a finalist's KL may differ after its reload, beyond what rounding in the model's type
    makes, which is measured: the unquantized model in batches of two sizes."""
    runtime: RuntimeChoice | None = None
    """What finalists are for: a scheme whose checkpoint it refuses by rule is none; `vllm` is vLLM on every device."""
    min_done: int = Field(default=1, ge=0)
    """Trials that must succeed besides the plain cast, or the step fails, as it does where none survives its reload;
    with 0 a search that finds nothing is a result too."""
    on_indivisible: Literal["fail", "keep"] = "fail"
    """Where a group does not divide a layer's input width: that scheme fails, or that layer stays in 16 bits, which
    `search.json` lists."""
    seed: int = Field(default=0, ge=0)
    """Chooses the rows; torch's seed in every trial."""

    def check(self, sources: Mapping[str, Any]) -> None:
        """Check a checkpoint that is wired against the dataset, and the schemes' groups against its layers."""
        check_planned(sources, self.INPUTS, unquantized=("model",), schemes=getattr(self.proposer, "schemes", ()))

    def run(self, context: Context) -> Outcome:
        """Search, verify and write `search.json` and the finalists' checkpoints.

        Raises:
            StageFailed: too few trials succeeded, or no finalist survived its reload.
            Transient: a trial's worker was lost; the trials that are done stay done.
            OutOfMemory: a trial ran out of memory with a micro-batch that can be made smaller.
        """
        import ray

        from stages.formats.tokens import shard_pattern
        from stages.quantize.rows import num_distinct, num_filled, num_measured, read_distinct_rows, split_rows

        rows = read_distinct_rows(context.one("data").paths(shard_pattern("calibration")))
        calibration, evaluation = split_rows(
            rows, calibration_tokens=self.calibration_tokens, evaluation_tokens=self.evaluation_tokens, seed=self.seed
        )
        measured = num_measured(evaluation)
        if num_filled(calibration) < self.calibration_tokens or measured < self.evaluation_tokens:
            seen = f"{num_distinct(calibration)} tokens to calibrate on, {measured} of other documents to measure on"
            context.reporter.note(f"a small calibration split: {seen}")
        job = ray.put(self._job(context, calibration))
        survey_task = remote_task(_survey, context, fresh_process=True, num_returns=2)
        survey_ref, base = survey_task.remote(job, evaluation)
        survey = fetch_result(survey_ref)
        if not survey.replays_head:
            context.reporter.note("the head cannot be replayed, so all logits are kept; evaluation_tokens bounds them")
        if not survey.whole_rows:
            from stages.models.segments import SEGMENTS_ALONE

            context.reporter.note(SEGMENTS_ALONE.format("the model"))
        receipts = self._search(context, job, survey, base)
        trials = [receipt.trial for receipt in receipts.values()]
        refused = find_refused(receipts, context, self.runtime)
        front = pareto_front(points_of(trial for trial in trials if trial.scheme not in refused))
        # The cast of a model in 16 bits is that model: it beats what is larger, and has no checkpoint here.
        order = [point for point in preference(front, self.max_kl) if receipts[point.name].folder]
        published: dict[str, tuple[File, ...]] = {}

        def reload(names: Sequence[str]) -> Mapping[str, float | str]:
            return _reload(names, context, receipts, published, (job, survey, base))

        verdict = verify(
            order, wanted=self.finalists, tolerance=self.reload_tolerance, noise=survey.noise, reload=reload
        )
        for name, reason in verdict.rejected.items():
            context.reporter.note(f"finalist {name} does not count: {reason}")
            context.out.delete([file.name for file in published.get(name, ())])
        if verdict.rejected and not verdict.accepted and self.min_done:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in verdict.rejected.items())
            raise StageFailed(f"none of {len(verdict.rejected)} finalists survived its reload: {reasons}")
        return self._finish(context, trials, front, replace(verdict, refused=refused), survey.bytes_16)

    def _job(self, context: Context, calibration: "TokenRows") -> "SearchJob":
        from stages.formats.dataset import DatasetInfo
        from stages.quantize.job import SearchJob

        resources = context.resources
        return SearchJob(
            model=context.one("model"),
            resume=context.resume,
            calibration=calibration,
            dataset=DatasetInfo.read(context.one("data")),
            micro_batch=resources.micro_batch,
            device=device_of(resources),
            seed=self.seed,
            on_indivisible=self.on_indivisible,
        )

    def _search(self, context: Context, job: Any, survey: "Survey", base: Any) -> dict[str, Receipt]:
        """Return every scheme's receipt, in the order of their proposal: of an earlier attempt, or of a trial now."""
        receipts: dict[str, Receipt] = {}
        while True:
            proposed = self.proposer.propose([receipt.trial for receipt in receipts.values()])
            # The cast comes first of all: it is what every other scheme has to beat.
            asked = proposed if receipts else [CAST, *proposed]
            schemes = {scheme.name: scheme for scheme in asked if scheme.name not in receipts}
            if not schemes:
                break
            known = known_receipts(schemes.values(), context.resume, survey, self.on_indivisible)
            num_schemes = len(receipts) + len(schemes)
            for index, receipt in enumerate(known.values()):
                _report(context, receipt.trial, len(receipts) + index + 1, num_schemes)
            for line in describe_trials([receipt.trial for receipt in known.values()]):
                context.reporter.note(line)
            pending = {name: scheme for name, scheme in schemes.items() if name not in known}
            if pending:
                logger.info("deciding to run %d of %d schemes, since the others are known", len(pending), len(schemes))
                num_tried = len(receipts) + len(known)
                known |= _run_trials(pending, context, job, survey, base, num_tried=num_tried)
            receipts |= {name: known[name] for name in schemes}
        check_enough([receipt.trial for receipt in receipts.values()], self.min_done)
        return receipts

    def _finish(
        self,
        context: Context,
        trials: Sequence[Trial],
        front: tuple[TrialPoint, ...],
        verdict: Verification,
        base_bytes: int,
    ) -> Outcome:
        """Write `search.json`, report what was chosen, and return the final numbers."""
        model = context.one("model")
        search = assemble_search(
            trials, front, verdict, base=model.fingerprint, base_bytes=base_bytes, max_kl=self.max_kl
        )
        search.write(context.out)
        if verdict.refused and not verdict.accepted:
            context.reporter.note(f"chose none: {self.runtime} serves no scheme that succeeded")
        else:
            context.reporter.note(describe_choice(search))
        return Outcome(final_metrics(search))


def _report(context: Context, trial: Trial, num_tried: int, num_schemes: int) -> None:
    """Report the trial of one scheme."""
    context.reporter.progress(num_tried, num_schemes, "trials")
    if not isinstance(trial, FailedTrial):
        context.reporter.curve(num_tried, {"trial/kl": trial.kl, "trial/size_bytes": trial.size_bytes})


def _survey(job: "SearchJob", evaluation: "TokenRows") -> Any:
    """Run in a worker: see `survey_model`."""
    import_for_measuring()
    from stages.quantize.trial import survey_model

    return survey_model(job, evaluation)


def _trial(
    config: Mapping[str, Any],
    *,
    setup: WorkerSetup,
    schemes: Mapping[str, Scheme],
    job: Any,
    survey: "Survey",
    base: Any,
) -> dict[str, Any]:
    """Run in a Tune trial: try one scheme; its receipt says how it went, except where memory did not suffice."""
    import_for_quantizing()
    setup.begin()
    from stages.quantize.trial import run_trial

    try:
        run_trial(schemes[config["scheme"]], job, survey, base)
    except OutOfMemory as error:
        return {"out_of_memory": str(error)}
    return {"out_of_memory": None}


def _remeasure(names: Sequence[str], finalists: Artifact, job: "SearchJob", survey: "Survey", base: Any) -> Any:
    """Run in a worker: see `remeasure`."""
    import_for_measuring()
    from stages.quantize.trial import remeasure

    return remeasure(names, finalists, job, survey, base)


def _run_trials(
    schemes: Mapping[str, Scheme], context: Context, job: Any, survey: "Survey", base: Any, *, num_tried: int
) -> dict[str, Receipt]:
    """Run one Tune trial for each scheme and return their receipts."""
    from ray import tune

    resources, num_schemes = context.resources, num_tried + len(schemes)
    receipts: dict[str, Receipt] = {}

    class Watch(tune.Callback):  # type: ignore[misc]  # the base is untyped
        """Reports each trial as it ends."""

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            name = trial.config["scheme"]
            if receipt := read_receipt(context.resume, name):
                receipts[name] = receipt
                _report(context, receipt.trial, num_tried + len(receipts), num_schemes)
                context.reporter.note(*describe_trials([receipt.trial]))

    trial = tune.with_parameters(
        _trial, setup=WorkerSetup.of(context), schemes=schemes, job=job, survey=survey, base=base
    )
    with (
        tempfile.TemporaryDirectory(prefix="stillhouse-tune-") as folder,
        environment(QUIET_TUNE),
        contextlib.redirect_stdout(io.StringIO()),  # prints a table whatever `verbose` says
    ):
        results = tune.Tuner(
            tune.with_resources(trial, tune_resources(resources)),
            param_space={"scheme": tune.grid_search(list(schemes))},
            tune_config=tune.TuneConfig(max_concurrent_trials=resources.workers),
            run_config=tune.RunConfig(
                name="search",
                storage_path=folder,
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=0),
                callbacks=[Watch()],
            ),
        ).fit()
        check_lost([name for name in schemes if name not in receipts], results, survey.micro_batch)
    return receipts


def _reload(
    names: Sequence[str],
    context: Context,
    receipts: Mapping[str, Receipt],
    published: dict[str, tuple[File, ...]],
    measuring: tuple[Any, "Survey", Any],
) -> Mapping[str, float | str]:
    """Copy finalists from `resume` to `out`, then measure them from there in a process of its own."""
    found: dict[str, float | str] = {}
    for name in names:
        try:
            published[name] = publish(receipts[name], context.resume, context.out)
        except (FileNotFoundError, StageFailed) as error:
            found[name] = f"its checkpoint cannot be read: {error}"
    readable = [name for name in names if name in published]
    if readable:
        files = tuple(file for name in readable for file in published[name])
        finalists = Artifact("search", context.fingerprint, files)
        found |= fetch_result(
            remote_task(_remeasure, context, fresh_process=True).remote(readable, finalists, *measuring)
        )
    return found
