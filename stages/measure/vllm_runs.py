"""Measure checkpoints in the real vLLM: each in a process of its own, loaded, compared with transformers, timed.

One after the other, since an engine takes the memory of a device for itself; within a model, batches take turns.
What vLLM refuses is that candidate's reason, and the others go on. Compilation and graphs are left out on a CPU
(they take minutes there), and are on with CUDA, as vLLM serves by default.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

import stages.runtime
from stages.candidates import Candidate
from stages.errors import OutOfMemory, StageFailed, StillhouseError, Transient
from stages.formats.speed import CandidateSpeed, SameText
from stages.measure.generation import Load, Timings, summarize, throughput
from stages.measure.same_text import NUM_PROMPTS, compare_text, text_prompts
from stages.runtime.serving_process import ServingProcess
from stages.runtime.vllm_environment import InstalledVLLM, locate, vllm_variables
from stages.runtime.workers import WorkerSetup

if TYPE_CHECKING:
    from stages.measure.runtimes import VLLM
    from stages.measure.stage import Measure

__all__ = ["measure_in_vllm"]

SCRIPT = Path(stages.runtime.__file__).with_name("vllm_worker.py")
LOAD_SECONDS, CALL_SECONDS = 1800.0, 600.0
"""Longest that loading (a large model from a network's disk; compilation) and a call may take."""
LEAST_CACHE_BYTES = 256 * 1024 * 1024
UNKNOWN_CACHE_BYTES = 1024 * 1024 * 1024
"""Of a model whose config does not say how large a token's keys and values are."""


def measure_in_vllm(
    config: "Measure",
    runtime: "VLLM",
    candidates: list[Candidate],
    setup: WorkerSetup,
    logs: dict[str, list[str]],
) -> dict[str, CandidateSpeed]:
    """Measure candidates one after the other; what one of them lacks is said in its place.

    Args:
        config: the fixed work.
        runtime: which vLLM.
        candidates: those whose context suffices.
        setup: of the worker.
        logs: gets what vLLM said of each candidate that failed.

    Raises:
        StageFailed: vLLM's environment is not here, or has another version.
        ExternalDataError: the same, where nothing is installed.
    """
    if runtime.device != setup.device:
        raise StageFailed(
            f"runtime=VLLM(device={runtime.device!r}), but the step computes on {setup.device}; expected the same: "
            "change it, or gpus_per_worker"
        )
    installed = locate(runtime.python, runtime.version, runtime.device)
    vocab_size = min((_text(c)["vocab_size"] for c in candidates if "vocab_size" in _text(c)), default=2)
    found = {}
    for index, candidate in enumerate(candidates):
        found[candidate.name] = _measure(config, installed, candidate, vocab_size, logs)
        setup.reporter.progress(index + 1, len(candidates), "models")
    return found


def _measure(
    config: "Measure", installed: InstalledVLLM, candidate: Candidate, vocab_size: int, logs: dict[str, list[str]]
) -> CandidateSpeed:
    """Measure one candidate, or say why not."""
    name = f"vLLM {installed.version} on {'a CPU' if installed.device == 'cpu' else 'CUDA'}"
    runtime = f"vllm-{installed.device}"
    try:
        folder = candidate.artifact.folder(candidate.folder)
        dtype = "auto" if config.dtype == "stored" else config.dtype  # of float32 weights vLLM makes bfloat16 itself
        prompts = text_prompts(folder, max_tokens=config.prompt_tokens, vocab_size=vocab_size, seed=config.seed)
        variables = vllm_variables(installed.python, installed.device, num_threads=config.threads)
        with ServingProcess(installed.python, SCRIPT, environment=variables) as process:
            try:
                run = _Run(config, process, vocab_size)
                facts = run.load(folder, dtype, candidate, eager=installed.device == "cpu")
                written = run.generate(prompts)["tokens"]
                dtype = facts["dtype"]
                figures = run.figures(max(facts["weights_bytes"], _stored_bytes(folder, dtype)))
            except OutOfMemory as error:
                return CandidateSpeed(runtime=runtime, reason=f"{name} has no memory for it: {error}")
            except StageFailed as error:
                logs[candidate.name] = process.log
                return CandidateSpeed(runtime=runtime, served=False, reason=f"{name} does not serve it: {error}")
        same, reason = _compare(folder, prompts, written, dtype, installed.device)
        return CandidateSpeed(runtime=runtime, served=True, dtype=dtype, same_text=same, reason=reason, **figures)
    except Transient:
        raise
    except StillhouseError as error:
        return CandidateSpeed(runtime=runtime, reason=str(error))


def _compare(
    folder: Path, prompts: list[list[int]], written: list[list[int]], dtype: str, device: str
) -> tuple[SameText | None, str | None]:
    try:
        return compare_text(folder, prompts, written, dtype=dtype, device=device), None
    except (StillhouseError, RuntimeError) as error:
        return None, f"its text could not be compared with transformers': {error}"


class _Run:
    """The fixed work, asked of a process."""

    def __init__(self, config: "Measure", process: ServingProcess, vocab_size: int) -> None:
        self._config, self._process, self._vocab_size = config, process, vocab_size

    def load(self, folder: Path, dtype: str, candidate: Candidate, *, eager: bool) -> dict[str, Any]:
        config = self._config
        context = config.prompt_tokens + config.new_tokens
        largest = max(int(config.largest_batch), NUM_PROMPTS)
        facts: dict[str, Any] = self._process.call(
            "load",
            timeout_seconds=LOAD_SECONDS,
            model=str(folder),
            dtype=dtype,
            context=context,
            batch_size=largest,
            cache_bytes=_cache_bytes(_text(candidate), largest * context),
            eager=eager,
        )
        return facts

    def generate(self, prompts: list[list[int]]) -> dict[str, Any]:
        found: dict[str, Any] = self._process.call(
            "generate", timeout_seconds=CALL_SECONDS, prompts=prompts, new_tokens=self._config.new_tokens
        )
        return found

    def figures(self, weights_bytes: int) -> dict[str, Any]:
        """Return a candidate's figures by their names."""
        config = self._config
        load = config.load(config.batch_size)
        found: dict[str, Any] = summarize(self._time(load, config.warmup, config.repeats), load)
        by_batch = {str(config.batch_size): found["tokens_per_second"]}
        for batch_size in config.throughput_batch_sizes:
            load = config.load(batch_size)
            by_batch[str(batch_size)] = throughput(self._time(load, 1, config.throughput_repeats), load)
        memory = self._process.call(
            "memory",
            timeout_seconds=CALL_SECONDS,
            prompts=self._prompts(config.load(config.batch_size), config.seed),
            new_tokens=config.new_tokens,
        )
        return found | {
            "by_batch": by_batch,
            "throughput_tokens_per_second": by_batch[config.largest_batch],
            "peak_memory_bytes": weights_bytes + memory["cache_bytes"] + memory["peak_bytes"],
        }

    def _time(self, load: Load, warmup: int, repeats: int) -> list[Timings]:
        runs = [self.generate(self._prompts(load, self._config.seed + index)) for index in range(warmup + repeats)]
        return [Timings(max(run["first_seconds"]), tuple(run["step_seconds"])) for run in runs[warmup:]]

    def _prompts(self, load: Load, seed: int) -> list[list[int]]:
        prompts: list[list[int]] = load.prompt(self._vocab_size, seed=seed, device="cpu").tolist()
        return prompts


def _text(candidate: Candidate) -> Mapping[str, Any]:
    text: Mapping[str, Any] = candidate.config.get("text_config") or candidate.config
    return text


def _cache_bytes(text: Mapping[str, Any], tokens: int) -> int:
    """Return twice the bytes of so many tokens' keys and values in 32 bits: blocks are filled in part."""
    heads = text.get("num_key_value_heads") or text.get("num_attention_heads")
    width, layers = text.get("hidden_size"), text.get("num_hidden_layers")
    if not heads or not width or not layers:
        return UNKNOWN_CACHE_BYTES
    size: int = text.get("head_dim") or width // text.get("num_attention_heads", heads)
    needed: int = 2 * 4 * 2 * layers * heads * size * tokens
    return max(LEAST_CACHE_BYTES, needed)


def _stored_bytes(folder: Path, dtype: str) -> int:
    """Return the bytes of a checkpoint's tensors, floats in the type that is computed in.

    vLLM's CPU kernels move weights into buffers of their own, so that its tensors alone would be too few.
    """
    import math

    import torch

    width: int = getattr(torch, dtype).itemsize
    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  it is no mapping
                part = file.get_slice(name)
                stored = part.get_dtype()
                size = width if stored in ("F32", "F16", "BF16", "F64") else _ITEM_BYTES.get(stored, 1)
                total += math.prod(part.get_shape()) * size
    return total


_ITEM_BYTES = {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2}
