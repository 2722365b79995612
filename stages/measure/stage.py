"""Measure models on one machine, in the runtime that will serve them: latency, tokens per second, peak memory.

The runtime, the device's model, the threads, the batches and the number format are config, hence identity: a
measurement is never reused on another machine. In transformers all models share one process and their runs are
interleaved, so that they can be compared; a quantized checkpoint is unpacked there and would run in the format of its
base, so it is not measured, and the reason is written. vLLM runs what it serves, in an environment of its own.

What one model lacks is written in its place, with the reason; the others go on.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from stages.contract import Context, Input, Kind, Outcome, Stage
from stages.formats.speed import CandidateSpeed, Speed
from stages.measure.runtimes import VLLM, MeasuredRuntime, Transformers
from stages.runtime.workers import WorkerSetup, fetch_result, remote_task

if TYPE_CHECKING:
    from stages.candidates import Candidate
    from stages.measure.generation import Load

logger = logging.getLogger(__name__)

__all__ = ["NO_KERNEL", "VLLM", "Measure", "Transformers", "measure"]

NO_KERNEL = "no kernel here: transformers unpacks compressed-tensors weights; Measure(runtime=VLLM(…)) measures them"
"""Why quantized candidates have no latency in transformers."""


class Measure(Stage):
    """Speed and memory of each model on one kind of machine."""

    KIND: ClassVar[Kind] = "speed"
    REVISION: ClassVar[str] = "2026-11-25 runtimes, stored number formats, larger batches; a loss is no verdict"
    PLACES_WORKERS: ClassVar = True
    INPUTS: ClassVar[Mapping[str, Input]] = {"models": Input(("model", "search"), many=True)}

    runtime: MeasuredRuntime = Transformers()
    """What serves the models."""
    device: str
    """Model name of the device, as `describe_gpu()` or `describe_cpu()` gives it, e.g. `NVIDIA H100 80GB HBM3`; the
    worker must have just this one."""
    threads: int = Field(ge=1)
    """CPU threads of torch; no more than the step's `cpus_per_worker`."""
    dtype: Literal["stored", "float32", "bfloat16", "float16"] = "stored"
    """Number format of weights and activations; `stored` is each checkpoint's own."""
    batch_size: int = Field(1, ge=1)
    """Sequences generated at once for latency and memory; 1 is a single user's latency."""
    throughput_batch_sizes: tuple[int, ...] = (8,)
    """Sequences generated at once for throughput, for each of these numbers."""
    throughput_repeats: int = Field(3, ge=1)
    """Whole generations of each model and each of these batches that are recorded, after one that is not."""
    prompt_tokens: int = Field(128, ge=1)
    """Tokens of each prompt."""
    new_tokens: int = Field(32, ge=2)
    """Tokens generated after each prompt."""
    warmup: int = Field(2, ge=0)
    """Whole generations of each model that are not recorded."""
    repeats: int = Field(10, ge=2)
    """Whole generations of each model that are recorded; 10 give 310 decode steps."""
    seed: int = 0
    """Seed of the prompts' random tokens."""

    def run(self, context: Context) -> Outcome:
        """Measure every model that the runtime serves.

        Raises:
            StageFailed: fewer CPUs than threads, another device, or a runtime that is not there.
            OutOfMemory: the models that were loaded do not fit a run together.
        """
        from stages.candidates import read_candidates
        from stages.errors import StageFailed

        resources = context.resources
        if self.threads > resources.cpus_per_worker:
            raise StageFailed(
                f"threads={self.threads}, but the step takes cpus_per_worker={resources.cpus_per_worker:g}; expected "
                "as many CPUs or more, since threads that share a CPU measure the wait for it: change one of them"
            )
        candidates = read_candidates(context.many("models"))
        setup = replace(WorkerSetup.of(context), num_threads=self.threads)
        task = remote_task(measure, context, setup=setup)
        found: dict[str, CandidateSpeed]
        found, logs = fetch_result(task.remote(self, candidates, setup))
        for name, lines in logs.items():
            logger.info("%s: its runtime said last:\n%s", name, "\n".join(lines))
        fixed = {name: getattr(self, name) for name in Speed.model_fields if name not in ("models", "runtime")}
        models = {candidate.name: found[candidate.name] for candidate in candidates}
        Speed(runtime=self._runtime_name(), **fixed, models=models).write(context.out)
        for name, speed in models.items():
            for text in (speed.reason, speed.same_text and speed.same_text.text):
                if text and text != NO_KERNEL:
                    context.reporter.note(f"{name}: {text}")
        return Outcome({f"{name}/{model}": value for model in found for name, value in found[model].figures.items()})

    def load(self, batch_size: int) -> "Load":
        """Return the fixed work of one run of a batch."""
        from stages.measure.generation import Load

        return Load(batch_size, self.prompt_tokens, self.new_tokens)

    @property
    def largest_batch(self) -> str:
        """The largest number of sequences at once, as `by_batch` names it."""
        return str(max((self.batch_size, *self.throughput_batch_sizes)))

    def _runtime_name(self) -> str:
        if isinstance(self.runtime, VLLM):
            return f"vllm {self.runtime.resolved().version} on {self.runtime.device}"
        from importlib.metadata import version

        return f"transformers {version('transformers')}"


def _is_quantized(candidate: "Candidate") -> bool:
    """Return whether transformers would unpack a checkpoint; one given from outside may be quantized as well."""
    return "quantization_config" in candidate.config


def measure(
    config: Measure, candidates: "list[Candidate]", setup: WorkerSetup
) -> tuple[dict[str, CandidateSpeed], dict[str, list[str]]]:
    """Measure the models in a worker; return what each has, or why not, and what its runtime said where it failed."""
    from stages.errors import Transient
    from stages.runtime.translation import one_line

    _check_device(config, setup.device)
    found, fitting = {}, []
    for candidate in candidates:
        try:
            _check_context(config, candidate)
            fitting.append(candidate)
        except Exception as error:  # noqa: BLE001  see below
            found[candidate.name] = CandidateSpeed(reason=one_line(error))
    if isinstance(config.runtime, VLLM):
        from stages.measure.vllm_runs import measure_in_vllm

        logs: dict[str, list[str]] = {}
        return found | measure_in_vllm(config, config.runtime, fitting, setup, logs), logs
    loaded: dict[str, Any] = {}
    for candidate in fitting:
        if _is_quantized(candidate):
            found[candidate.name] = CandidateSpeed(reason=NO_KERNEL)
            continue
        try:
            loaded[candidate.name] = _load(config, candidate, setup.device)
        except Transient:
            raise
        except Exception as error:  # noqa: BLE001
            # A family may take or return what no other does; that must not cost the other models their figures.
            found[candidate.name] = CandidateSpeed(reason=f"it could not be measured: {one_line(error)}")
    return found | _time(config, loaded, setup), {}


def _load(config: Measure, candidate: "Candidate", device: str) -> tuple[Any, int, str]:
    """Load a model; return it, its peak bytes in one generation, and the number format that it computes in."""
    from stages.measure.generation import measure_memory
    from stages.models.checkpoints import load_model

    stored = config.dtype == "stored"
    folder = candidate.artifact.folder(candidate.folder)
    model = load_model(folder, dtype="auto" if stored else config.dtype, device=device)
    peak = measure_memory(model, config.load(config.batch_size), seed=config.seed)
    return model, peak, str(model.dtype).removeprefix("torch.")


def _time(config: Measure, loaded: Mapping[str, Any], setup: WorkerSetup) -> dict[str, CandidateSpeed]:
    """Time the models that are loaded, interleaved."""
    from stages.errors import OutOfMemory
    from stages.measure.generation import summarize, throughput, time_interleaved

    models = {name: model for name, (model, _, _) in loaded.items()}
    load = config.load(config.batch_size)
    runs, failed = time_interleaved(
        models,
        load,
        warmup=config.warmup,
        repeats=config.repeats,
        seed=config.seed,
        progress=lambda done, total: setup.reporter.progress(done, total, "rounds"),
    )
    found = {name: CandidateSpeed(reason=f"it could not be measured: {text}") for name, text in failed.items()}
    figures = {name: summarize(timed, load) for name, timed in runs.items()}
    by_batch = {name: {str(config.batch_size): figures[name]["tokens_per_second"]} for name in figures}
    reasons: dict[str, list[str]] = {name: [] for name in figures}
    models = {name: models[name] for name in figures}
    for batch_size in config.throughput_batch_sizes:
        load, repeats, seed = config.load(batch_size), config.throughput_repeats, config.seed
        try:
            runs, failed = time_interleaved(
                models, load, warmup=1, repeats=repeats, seed=seed, progress=lambda *_: None
            )
        except OutOfMemory as error:
            setup.reporter.note(f"{batch_size} sequences at once are not measured: {error}")
            continue
        for name, timed in runs.items():
            by_batch[name][str(batch_size)] = throughput(timed, load)
        for name, text in failed.items():
            reasons[name].append(f"{batch_size} sequences at once were not measured: {text}")
    return found | {
        name: CandidateSpeed(
            **figures[name],
            throughput_tokens_per_second=by_batch[name].get(config.largest_batch),
            by_batch=by_batch[name],
            peak_memory_bytes=loaded[name][1],
            dtype=loaded[name][2],
            runtime="transformers",
            served=True,
            reason="; ".join(reasons[name]) or None,
        )
        for name in figures
    }


def _check_device(config: Measure, device: str) -> None:
    from stages.errors import StageFailed
    from stages.measure.device import describe_cpu

    if device == "cuda":
        import torch

        actual = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no CUDA device"
    else:
        actual = describe_cpu()
    if actual != config.device:
        raise StageFailed(
            f"this worker computes on {actual!r}, the config says device={config.device!r}; expected the same, since a "
            f"measurement holds for one machine: set device={actual!r}, or give the step the resources "
            "(gpus_per_worker) and the nodes of the device that is meant"
        )


def _check_context(config: Measure, candidate: "Candidate") -> None:
    """Check that a model with a table of positions has enough; rotary ones compute any length, equally fast."""
    from stages.errors import StageFailed
    from stages.models.context_length import longest_context, text_part

    longest = longest_context(candidate.config)
    wanted = config.prompt_tokens + config.new_tokens
    rotary = any(key.startswith("rope") for key in text_part(candidate.config))
    if longest is not None and wanted > longest and not rotary:
        raise StageFailed(
            f"{candidate.name!r} reads {longest} tokens at most, prompt_tokens + new_tokens = {wanted}; expected no "
            "more: lower one of them"
        )
