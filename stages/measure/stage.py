"""Measure models on one machine: prefill and decode latency, tokens per second, peak memory.

All models in one process, taking turns, so that they can be compared. The device's model, the threads,
the batch and the number format are config, hence identity: a measurement is never reused on another machine. A
quantized checkpoint is unpacked by transformers and would run in the format of its base, so it is not measured, and
the reason is written.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from stages.contract import Context, Input, Kind, Outcome, Reporter, Stage

if TYPE_CHECKING:
    from stages.candidates import Candidate

__all__ = ["NO_KERNEL", "Measure"]

NO_KERNEL = "no kernel here: transformers unpacks compressed-tensors weights"
"""Why quantized candidates have no latency."""
FIGURES = (
    "prefill_p50_ms",
    "prefill_p95_ms",
    "latency_p50_ms",
    "latency_p95_ms",
    "tokens_per_second",
    "peak_memory_bytes",
)


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
        import ray

        from stages.candidates import read_candidates
        from stages.errors import StageFailed

        resources = context.resources
        if self.threads > resources.cpus_per_worker:
            raise StageFailed(
                f"threads={self.threads}, but the step takes cpus_per_worker={resources.cpus_per_worker:g}; expected "
                "as many CPUs or more, since threads that share a CPU measure the wait for it: change one of them"
            )
        options = {
            "num_cpus": resources.cpus_per_worker,
            "num_gpus": resources.gpus_per_worker,
            "memory": resources.memory_bytes_per_worker,
            "max_retries": 0,
        }
        candidates = read_candidates(context.many("models"))
        runnable = [candidate for candidate in candidates if not _is_quantized(candidate)]
        task = ray.remote(_measure).options(**options)
        found = ray.get(task.remote(self, runnable, resources.gpus_per_worker > 0, context.reporter))
        absent = {**dict.fromkeys(FIGURES), "reason": NO_KERNEL}
        models = {c.name: {**found[c.name], "reason": None} if c.name in found else absent for c in candidates}
        fixed = ("device", "threads", "dtype", "batch_size", "prompt_tokens", "new_tokens", "repeats")
        context.out.put_json("speed.json", {**self.model_dump(include=set(fixed)), "models": models})
        return Outcome({f"{figure}/{name}": found[name][figure] for name in found for figure in FIGURES})


def _is_quantized(candidate: "Candidate") -> bool:
    """Tell whether transformers would unpack a checkpoint; one given from outside may be quantized as well."""
    return "quantization_config" in candidate.artifact.read_json(f"{candidate.folder}/config.json")


def _measure(
    config: Measure, candidates: "list[Candidate]", gpu: bool, reporter: Reporter
) -> dict[str, dict[str, Any]]:
    """Load the models in a worker and measure them; return their figures by name."""
    import torch

    from stages.measure.generation import Load, measure_memory, summarize, time_in_turns
    from stages.models.checkpoints import load_model

    reporter.started()
    _check_device(config, gpu)
    torch.set_num_threads(config.threads)
    load = Load(config.batch_size, config.prompt_tokens, config.new_tokens)
    models, memory = {}, {}
    for candidate in candidates:
        _check_context(config, candidate)
        folder = candidate.artifact.folder(candidate.folder)
        model = load_model(folder, dtype=config.dtype, device="cuda" if gpu else "cpu")
        models[candidate.name] = model
        memory[candidate.name] = measure_memory(model, load, seed=config.seed)
    runs = time_in_turns(
        models,
        load,
        warmup=config.warmup,
        repeats=config.repeats,
        seed=config.seed,
        progress=lambda done, total: reporter.progress(done, total, "turns"),
    )
    return {name: {**summarize(runs[name], load), "peak_memory_bytes": memory[name]} for name in models}


def _check_device(config: Measure, gpu: bool) -> None:
    from stages.errors import StageFailed
    from stages.measure.device import describe_cpu

    if gpu:
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

    values = candidate.artifact.read_json(f"{candidate.folder}/config.json")
    values = values.get("text_config") or values
    longest = values.get("max_position_embeddings") or values.get("n_positions")
    wanted = config.prompt_tokens + config.new_tokens
    if longest is not None and wanted > longest and not any(key.startswith("rope") for key in values):
        raise StageFailed(
            f"{candidate.name!r} reads {longest} tokens at most, prompt_tokens + new_tokens = {wanted}; expected no "
            "more: lower one of them"
        )
