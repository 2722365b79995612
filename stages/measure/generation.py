"""Time the generation of a fixed number of tokens after a fixed prompt, and count its memory.

Prefill is one forward pass over the prompt, which gives the first token; each decode step reads the cache (of keys and
values, or the state of a recurrent model) and gives one more; a family without one reads the whole text anew. The
end-of-text token is ignored, so every run does the same work. Models are interleaved (A B C A B C), so that a machine
that slows down meanwhile slows all of them.

Memory is the bytes of weights and buffers plus the most that one whole generation has allocated at once beyond them:
on CUDA by its allocator's counter, on a CPU by the record of torch's allocator that its profiler keeps. It is exact and
repeatable (resident set sizes are neither), and leaves out the libraries themselves and the scratch space of BLAS.

Shapes: B batch, P prompt tokens.
"""

import gc
import inspect
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from stages.errors import OutOfMemory, Transient
from stages.runtime.translation import one_line, within_memory
from stages.runtime.workarounds import allocations

CACHES = ("past_key_values", "cache_params")
"""What families call the cache that they take and return: attention, and state space models."""

__all__ = ["Load", "Timings", "measure_memory", "summarize", "throughput", "time_interleaved"]


@dataclass(frozen=True, slots=True)
class Load:
    """The fixed work of one run."""

    batch_size: int
    prompt_tokens: int
    new_tokens: int

    def prompt(self, vocab_size: int, *, seed: int, device: Any) -> torch.Tensor:
        """Return random token ids `[B, P]`: what they say does not change the work."""
        generator = torch.Generator().manual_seed(seed)
        ids_BP = torch.randint(0, vocab_size, (self.batch_size, self.prompt_tokens), generator=generator)
        return ids_BP.to(device)


@dataclass(frozen=True, slots=True)
class Timings:
    """What one run took."""

    prefill_seconds: float
    step_seconds: tuple[float, ...]
    """Each decode step; one fewer than the new tokens."""


def generate(model: Any, prompt_BP: torch.Tensor, new_tokens: int) -> Timings:
    """Generate greedily and time each forward pass.

    Raises:
        OutOfMemory: the device's memory did not suffice.
    """
    sync: Callable[[], None] = torch.cuda.synchronize if prompt_BP.is_cuda else lambda: None
    seconds = []
    inputs, cache = prompt_BP, None
    name, options = _call_options(model)
    batch_size, prompt_tokens = prompt_BP.shape
    what = f"generating {new_tokens} tokens after {prompt_tokens} in {batch_size} rows"
    advice = "all models are resident, since their runs are interleaved: measure fewer at once, or lower `batch_size`"
    with within_memory(what, advice=advice), torch.inference_mode():
        for _ in range(new_tokens):
            sync()
            start = time.perf_counter()
            output = model(input_ids=inputs, **options, **({name: cache} if name else {}))
            token_B1 = output.logits[:, -1:].argmax(-1)
            cache = getattr(output, name, None) if name else None
            inputs = torch.cat([inputs, token_B1], dim=1) if cache is None else token_B1
            sync()
            seconds.append(time.perf_counter() - start)
    return Timings(seconds[0], tuple(seconds[1:]))


def _call_options(model: Any) -> tuple[str | None, dict[str, Any]]:
    """Return the name of a model's cache, if it takes one, and what it is called with besides."""
    taken = inspect.signature(getattr(model, "forward", model)).parameters
    name = next((name for name in CACHES if name in taken), None)
    options = {"use_cache": name is not None, "logits_to_keep": 1}
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
    return name, {key: value for key, value in options.items() if key in taken or anything}


def time_interleaved(
    models: Mapping[str, Any],
    load: Load,
    *,
    warmup: int,
    repeats: int,
    seed: int,
    progress: Callable[[int, int], None],
) -> tuple[dict[str, list[Timings]], dict[str, str]]:
    """Run every model in each round, `warmup` rounds unrecorded and `repeats` recorded.

    Returns:
        the runs of each model, and of one that failed the reason instead.

    Raises:
        OutOfMemory: the models do not fit a run together.
    """
    vocab_size = min((model.config.get_text_config().vocab_size for model in models.values()), default=0)
    found: dict[str, list[Timings]] = {name: [] for name in models}
    failed: dict[str, str] = {}
    gc.collect()
    gc.disable()  # a collection in the middle of a step shows as a false p95
    try:
        for index in range(warmup + repeats if models else 0):
            for name, model in models.items():
                if name in failed:
                    continue
                prompt_BP = load.prompt(vocab_size, seed=seed + index, device=model.device)
                try:
                    timings = generate(model, prompt_BP, load.new_tokens)
                except (OutOfMemory, Transient):
                    raise
                except Exception as error:  # noqa: BLE001  a family of its own; the others are timed
                    failed[name] = one_line(error)
                    continue
                if index >= warmup:
                    found[name].append(timings)
            progress(index + 1, warmup + repeats)
    finally:
        gc.enable()
    return {name: runs for name, runs in found.items() if name not in failed}, failed


def summarize(runs: list[Timings], load: Load) -> dict[str, float]:
    """Return percentiles over the runs' prefills and over all their decode steps, and generated tokens per second."""
    prefill_ms = np.array([run.prefill_seconds for run in runs]) * 1000
    steps_ms = np.array([seconds for run in runs for seconds in run.step_seconds]) * 1000
    return {
        "prefill_p50_ms": float(np.percentile(prefill_ms, 50)),
        "prefill_p95_ms": float(np.percentile(prefill_ms, 95)),
        "latency_p50_ms": float(np.percentile(steps_ms, 50)),
        "latency_p95_ms": float(np.percentile(steps_ms, 95)),
        "tokens_per_second": throughput(runs, load),
    }


def throughput(runs: list[Timings], load: Load) -> float:
    """Return the generated tokens per second of the whole batch over prefill and decoding, in the median run."""
    whole_seconds = np.median([run.prefill_seconds + sum(run.step_seconds) for run in runs])
    return float(load.batch_size * load.new_tokens / whole_seconds)


def measure_memory(model: Any, load: Load, *, seed: int) -> int:
    """Return the peak bytes of weights, buffers, cache and activations in one generation (see above)."""
    tensors: dict[int, int] = {tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    prompt_BP = load.prompt(model.config.get_text_config().vocab_size, seed=seed, device=model.device)

    def run() -> None:
        generate(model, prompt_BP, load.new_tokens)

    return sum(tensors.values()) + (_cuda_peak(run) if prompt_BP.is_cuda else _cpu_peak(run))


def _cuda_peak(run: Callable[[], None]) -> int:
    run()  # libraries allocate their workspaces in the first run
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return int(torch.cuda.max_memory_allocated()) - int(before)


def _cpu_peak(run: Callable[[], None]) -> int:
    """Return the most bytes that torch's CPU allocator had given out at once during a run."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # keeps its start and stop lines off stderr; read at the first use
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    return max(0, int(np.cumsum(allocations(profiler)).max(initial=0)))
