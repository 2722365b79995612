"""Measure models on one machine: prefill and decode latency, tokens per second, peak memory.

All models in one process, their runs interleaved, so that they can be compared. The device's model, the threads,
the batch and the number format are config, hence identity: a measurement is never reused on another machine. A
quantized checkpoint is unpacked by transformers and would run in the format of its base, so it is not measured, and
the reason is written.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from stages.contract import Context, Input, Kind, Outcome, Stage
from stages.formats.speed import CandidateSpeed, Speed
from stages.runtime.workers import WorkerSetup, fetch_result, remote_task

if TYPE_CHECKING:
    from stages.candidates import Candidate

__all__ = ["NO_KERNEL", "Measure"]

NO_KERNEL = "no kernel here: transformers unpacks compressed-tensors weights"
"""Why quantized candidates have no latency."""


class Measure(Stage):
    """Speed and memory of each model on one kind of machine."""

    KIND: ClassVar[Kind] = "speed"
    REVISION: ClassVar[str] = "2026-11-21 first"
    PLACES_WORKERS: ClassVar = True
    INPUTS: ClassVar[Mapping[str, Input]] = {"models": Input(("model", "search"), many=True)}

    device: str
    """Model name of the device, as `describe_gpu()` or `describe_cpu()` gives it, e.g. `NVIDIA H100 80GB HBM3`; the
    worker must have just this one."""
    threads: int = Field(ge=1)
    """CPU threads of torch; no more than the step's `cpus_per_worker`."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of weights and activations."""
    batch_size: int = Field(1, ge=1)
    """Sequences generated at once; 1 is a single user's latency."""
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
        """Measure every model that runs in its own format here.

        Raises:
            StageFailed: fewer CPUs than threads, another device, or a model's context that the prompt does not fit.
            OutOfMemory: the models do not fit the device together.
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
        runnable = [candidate for candidate in candidates if not _is_quantized(candidate)]
        setup = replace(WorkerSetup.of(context), num_threads=self.threads)
        task = remote_task(_measure, context, setup=setup)
        found: dict[str, CandidateSpeed] = fetch_result(task.remote(self, runnable, setup))
        absent = CandidateSpeed(reason=NO_KERNEL)
        fixed = {name: getattr(self, name) for name in Speed.model_fields if name != "models"}
        Speed(**fixed, models={c.name: found.get(c.name, absent) for c in candidates}).write(context.out)
        return Outcome({f"{name}/{model}": value for model in found for name, value in found[model].figures.items()})


def _is_quantized(candidate: "Candidate") -> bool:
    """Return whether transformers would unpack a checkpoint; one given from outside may be quantized as well."""
    return "quantization_config" in candidate.config


def _measure(config: Measure, candidates: "list[Candidate]", setup: WorkerSetup) -> dict[str, CandidateSpeed]:
    """Load the models in a worker and measure them; return their figures by name."""
    from stages.measure.generation import Load, measure_memory, summarize, time_interleaved
    from stages.models.checkpoints import load_model

    _check_device(config, setup.device)
    load = Load(config.batch_size, config.prompt_tokens, config.new_tokens)
    models, memory = {}, {}
    for candidate in candidates:
        _check_context(config, candidate)
        model = load_model(candidate.artifact.folder(candidate.folder), dtype=config.dtype, device=setup.device)
        models[candidate.name] = model
        memory[candidate.name] = measure_memory(model, load, seed=config.seed)
    runs = time_interleaved(
        models,
        load,
        warmup=config.warmup,
        repeats=config.repeats,
        seed=config.seed,
        progress=lambda done, total: setup.reporter.progress(done, total, "rounds"),
    )
    return {
        name: CandidateSpeed(**summarize(runs[name], load), peak_memory_bytes=memory[name], reason=None)
        for name in models
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

    values = candidate.config.get("text_config") or candidate.config
    longest = values.get("max_position_embeddings") or values.get("n_positions")
    wanted = config.prompt_tokens + config.new_tokens
    if longest is not None and wanted > longest and not any(key.startswith("rope") for key in values):
        raise StageFailed(
            f"{candidate.name!r} reads {longest} tokens at most, prompt_tokens + new_tokens = {wanted}; expected no "
            "more: lower one of them"
        )
