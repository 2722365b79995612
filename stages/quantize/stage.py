"""Search quantization schemes for a model: one Ray Tune trial a scheme, then the best reloaded and measured again.

Promises: every scheme ends as a row of `search.json`, with its measured KL and its real bytes, or with the reason why
it failed; a finalist is one whose files, loaded by plain transformers in a process that did not quantize, have the KL
that its trial measured; an attempt that goes on runs only schemes that have no receipt.
Does not: train, search bits per layer, or measure speed.

Tune's own restore is not used: it keeps a search's state on one disk, while receipts live in the store.
"""

import contextlib
import io
import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, field_validator

from stages.contract import Artifact, Context, Input, Kind, Outcome, Reporter, Resources, Stage
from stages.errors import OutOfMemory, StageFailed, Transient
from stages.quantize.finalists import publish
from stages.quantize.imports import import_for_measuring, import_for_quantizing
from stages.quantize.records import (
    TrialRecord,
    assemble_search,
    check_enough,
    final_metrics,
    points_of,
    read_settled,
    receipt_name,
)
from stages.quantize.schemes import DEFAULT_SCHEMES, Scheme
from stages.quantize.selection import TrialPoint, Verification, pareto_front, preference, verify
from stages.runtime.processes import environment
from stages.runtime.translation import translate
from stages.storage import File

if TYPE_CHECKING:
    from stages.quantize.job import SearchJob, Survey
    from stages.quantize.rows import Rows

logger = logging.getLogger(__name__)

QUIET_TUNE = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
}
"""Tune writes no CSV, JSON or TensorBoard files, and leaves Ctrl+C to whoever runs the step."""


class Quantize(Stage):
    """Try quantization schemes on a model and keep the best of size against KL."""

    KIND: ClassVar[Kind] = "search"
    REVISION: ClassVar[str] = "2026-11-25 KL over the dataset's vocabulary, search.json with a schema"
    PLACES_WORKERS: ClassVar = True
    INPUTS: ClassVar[Mapping[str, Input]] = {"model": Input(("model",)), "data": Input(("dataset",))}
    FRESH_PROCESS: ClassVar[bool] = True

    schemes: tuple[Scheme, ...] = Field(default=DEFAULT_SCHEMES, min_length=1)
    """What is tried, one trial each."""
    calibration_rows: int = Field(default=128, ge=1)
    """Rows of the calibration split that GPTQ and SmoothQuant see at most; 128 is what arXiv:2210.17323 uses."""
    evaluation_rows: int = Field(default=64, ge=1)
    """Other rows of that split, on which the KL is measured, at most; of a smaller split both are cut alike."""
    finalists: int = Field(default=3, ge=1)
    """Checkpoints that are kept: the chosen one and its neighbors in size."""
    max_kl: float = Field(default=0.05, gt=0)
    """Nats per token to the unquantized model that the chosen one may have; 4-bit weights in groups of 128 by round to
    nearest have 0.03 on a small language model."""
    reload_tolerance: float = Field(default=1e-3, gt=0)
    """Nats per token by which a finalist's KL may differ after its reload."""
    min_done: int = Field(default=1, ge=0)
    """Trials that must succeed, or the step fails; with 0 a search that finds nothing is a result too."""
    seed: int = Field(default=0, ge=0)
    """Chooses the rows; torch's seed in every trial."""

    @field_validator("schemes")
    @classmethod
    def _names_differ(cls, schemes: tuple[Scheme, ...]) -> tuple[Scheme, ...]:
        names = [scheme.name for scheme in schemes]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"schemes names {', '.join(twice)} more than once; expected each scheme once")
        return schemes

    def run(self, context: Context) -> Outcome:
        """Search, verify and write `search.json` and the finalists' checkpoints.

        Raises:
            StageFailed: too few trials succeeded, or no finalist survived its reload.
            Transient: a trial's worker was lost; the trials that are done stay done.
            OutOfMemory: a trial ran out of memory with a micro-batch that can be made smaller.
        """
        import ray

        from stages.quantize.rows import read_rows, split_rows

        rows = read_rows(context.one("data").paths("tokens/calibration-*.parquet"))
        calibration, evaluation = split_rows(
            rows, calibration=self.calibration_rows, evaluation=self.evaluation_rows, seed=self.seed
        )
        if len(calibration) + len(evaluation) < self.calibration_rows + self.evaluation_rows:
            context.reporter.note(
                f"a small calibration split: {len(calibration)} rows to calibrate on, {len(evaluation)} to measure on"
            )
        job = ray.put(self._job(context, calibration))
        survey_ref, reference = _task(_survey, context.resources, num_returns=2).remote(
            job, evaluation, context.reporter
        )
        survey = _get(survey_ref)
        records = self._search(context, job, survey, reference)
        front = pareto_front(points_of(records))
        published: dict[str, tuple[File, ...]] = {}

        def reload(names: Sequence[str]) -> Mapping[str, float | str]:
            return _reload(names, context, records, published, (job, survey, reference))

        verdict = verify(
            preference(front, self.max_kl), wanted=self.finalists, tolerance=self.reload_tolerance, reload=reload
        )
        for name, reason in verdict.rejected.items():
            context.reporter.note(f"finalist {name} does not count: {reason}")
            context.out.delete([file.name for file in published.get(name, ())])
        if verdict.rejected and not verdict.accepted:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in verdict.rejected.items())
            raise StageFailed(f"none of {len(verdict.rejected)} finalists survived its reload: {reasons}")
        return self._finish(context, records, front, verdict)

    def _job(self, context: Context, calibration: "Rows") -> "SearchJob":
        from stages.formats.dataset import DatasetInfo
        from stages.quantize.job import SearchJob

        resources = context.resources
        return SearchJob(
            model=context.one("model"),
            resume=context.resume,
            calibration_RT=calibration.ids_RT,
            vocabulary_size=DatasetInfo.read(context.one("data")).vocabulary_size,
            micro_batch=resources.micro_batch,
            device="cuda" if resources.gpus_per_worker > 0 else "cpu",
            num_threads=max(1, int(resources.cpus_per_worker)),
            seed=self.seed,
        )

    def _search(self, context: Context, job: Any, survey: "Survey", reference: Any) -> list[TrialRecord]:
        """Return every scheme's record: of an earlier attempt, of a trial now, or why it cannot fit."""
        records = read_settled(self.schemes, context.resume, survey.layers.in_features)
        for index, record in enumerate(records.values()):
            _tell(context, record, index + 1, len(self.schemes))
        pending = {scheme.name: scheme for scheme in self.schemes if scheme.name not in records}
        if pending:
            logger.info(
                "deciding to run %d of %d schemes, since the others are settled", len(pending), len(self.schemes)
            )
            records |= _run_trials(pending, context, job, survey, reference, num_settled=len(records))
        ordered = [records[scheme.name] for scheme in self.schemes]
        check_enough(ordered, self.min_done)
        return ordered

    def _finish(
        self, context: Context, records: Sequence[TrialRecord], front: tuple[TrialPoint, ...], verdict: Verification
    ) -> Outcome:
        """Write `search.json`, tell what was chosen, and return the final numbers."""
        model = context.one("model")
        base_bytes = sum(file.size_bytes for file in model.below("model/*.safetensors"))
        search = assemble_search(
            records, front, verdict, base=model.fingerprint, base_bytes=base_bytes, max_kl=self.max_kl
        )
        context.out.put_json("search.json", search)
        metrics = final_metrics(search)
        if not verdict.accepted:
            reasons = sorted({str(record["error"]) for record in records if record["status"] != "done"})
            why = reasons[0] if len(reasons) == 1 else f"{reasons[0]}; and {len(reasons) - 1} other reasons"
            context.reporter.note(f"chose none, since no scheme succeeded: {why} (search.json has all)")
        elif search["chosen"] is None:
            best = min(verdict.accepted.values())
            context.reporter.note(
                f"chose none: the best finalist has KL {best:.2g} nats/token, and max_kl is {self.max_kl:g}"
            )
        else:
            size, kl = metrics["chosen_size_bytes"], metrics["chosen_kl"]
            context.reporter.note(f"chose {search['chosen']}: {size:.0f} bytes, KL {kl:.2g} nats/token")
        return Outcome(metrics)


def _tell(context: Context, record: TrialRecord, num_settled: int, num_schemes: int) -> None:
    """Report one settled scheme."""
    context.reporter.progress(num_settled, num_schemes, "trials")
    if record["status"] != "done":
        context.reporter.note(f"{record['scheme']} failed: {record['error']}")
        return
    context.reporter.note(f"{record['scheme']}: KL {record['kl']:.2g} nats/token, {record['size_bytes']} bytes")
    context.reporter.curve(num_settled, {"trial/kl": record["kl"], "trial/size_bytes": record["size_bytes"]})


def _options(resources: Resources) -> dict[str, float]:
    """Return what one worker takes, in Ray's words."""
    options: dict[str, float] = {"num_cpus": resources.cpus_per_worker, "num_gpus": resources.gpus_per_worker}
    if resources.memory_bytes_per_worker is not None:
        options["memory"] = resources.memory_bytes_per_worker
    return options


def _task(function: Callable[..., Any], resources: Resources, num_returns: int = 1) -> Any:
    """Return a function as a Ray task with a worker's resources, in a process that is not used again."""
    import ray

    return ray.remote(max_calls=1, max_retries=0, num_returns=num_returns, **_options(resources))(function)


def _get(ref: Any) -> Any:
    """Return a task's result; raise an error of ours, not Ray's wrapper around one."""
    import ray

    try:
        return ray.get(ref)
    except ray.exceptions.RayError as error:
        raise translate(error) from error


def _survey(job: "SearchJob", evaluation: "Rows", reporter: Reporter) -> Any:
    """Run in a worker: see `survey_model`."""
    reporter.started()
    import_for_measuring()
    from stages.quantize.trial import survey_model

    return survey_model(job, evaluation)


def _trial(
    config: Mapping[str, Any], *, schemes: Mapping[str, Scheme], job: Any, survey: "Survey", reference: Any
) -> dict[str, Any]:
    """Run in a Tune trial: try one scheme; its receipt says how it went, except where memory did not suffice."""
    import_for_quantizing()
    from stages.quantize.trial import run_trial

    try:
        run_trial(schemes[config["scheme"]], job, survey, reference)
    except OutOfMemory as error:
        return {"out_of_memory": str(error)}
    return {"out_of_memory": None}


def _remeasure(names: Sequence[str], finalists: Artifact, job: "SearchJob", survey: "Survey", reference: Any) -> Any:
    """Run in a worker: see `remeasure`."""
    import_for_measuring()
    from stages.quantize.trial import remeasure

    return remeasure(names, finalists, job, survey, reference)


def _run_trials(
    schemes: Mapping[str, Scheme], context: Context, job: Any, survey: "Survey", reference: Any, *, num_settled: int
) -> dict[str, TrialRecord]:
    """Run one Tune trial for each scheme and return their receipts."""
    from ray import tune

    resources, num_schemes = context.resources, num_settled + len(schemes)
    records: dict[str, TrialRecord] = {}

    class Watch(tune.Callback):  # type: ignore[misc]  # the base is untyped
        """Tells of each trial as it ends."""

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            name = trial.config["scheme"]
            if context.resume.has(receipt_name(name)):
                records[name] = context.resume.get_json(receipt_name(name))
                _tell(context, records[name], num_settled + len(records), num_schemes)

    takes = {key.removeprefix("num_"): value for key, value in _options(resources).items()}
    takes = {{"cpus": "cpu", "gpus": "gpu"}.get(key, key): value for key, value in takes.items()}
    trial = tune.with_parameters(_trial, schemes=schemes, job=job, survey=survey, reference=reference)
    with (
        tempfile.TemporaryDirectory(prefix="stillhouse-tune-") as folder,
        environment(QUIET_TUNE),
        contextlib.redirect_stdout(io.StringIO()),  # prints a table whatever `verbose` says
    ):
        results = tune.Tuner(
            tune.with_resources(trial, takes),
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
        _check_lost([name for name in schemes if name not in records], results, survey)
    return records


def _check_lost(missing: Sequence[str], results: Any, survey: "Survey") -> None:
    """Raise where trials left no receipt: something that another attempt may mend."""
    if not missing:
        return
    starved = [result.metrics["out_of_memory"] for result in results if (result.metrics or {}).get("out_of_memory")]
    reasons = sorted({str(error).strip() for error in results.errors})
    # Ray's memory monitor kills the worker before the kernel does, and says so.
    starved += [reason for reason in reasons if "OutOfMemoryError" in reason or "low on memory" in reason]
    if starved:
        raise OutOfMemory(starved[0], micro_batch=survey.micro_batch)
    shown = "; ".join(reason.rpartition("\n")[2] for reason in reasons)
    raise Transient(
        f"{len(missing)} trials ended without a receipt ({', '.join(missing)}): {shown}; the others stay done"
    )


def _reload(
    names: Sequence[str],
    context: Context,
    records: Sequence[TrialRecord],
    published: dict[str, tuple[File, ...]],
    measuring: tuple[Any, "Survey", Any],
) -> Mapping[str, float | str]:
    """Copy finalists from `resume` to `out`, then measure them from there in a process of its own."""
    by_name = {record["scheme"]: record for record in records}
    found: dict[str, float | str] = {}
    for name in names:
        try:
            published[name] = publish(by_name[name], context.resume, context.out)
        except (FileNotFoundError, StageFailed) as error:
            found[name] = f"its checkpoint cannot be read: {error}"
    readable = [name for name in names if name in published]
    if readable:
        files = tuple(file for name in readable for file in published[name])
        finalists = Artifact("search", context.fingerprint, files)
        remeasure = _task(_remeasure, context.resources)
        found |= _get(remeasure.remote(readable, finalists, *measuring))
    return found
