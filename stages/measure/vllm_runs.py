"""Measure checkpoints in the real vLLM: each in a process of its own, loaded, compared with transformers, timed.

One after the other, since an engine takes the memory of a device for itself; within a model, batches take turns.
What vLLM refuses is that candidate's reason, and the others go on. A verdict is only what loading or the first text
raises by itself: a process that is lost or takes too long is started once more and then judges nothing, and what fails
after the first text is one missing figure. Compilation and graphs are left out on a CPU
(they take minutes there), and are on with CUDA, as vLLM serves by default.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

import stages.runtime
from stages.candidates import Candidate
from stages.errors import OutOfMemory, StageFailed, Transient
from stages.formats.speed import CandidateSpeed, SameText
from stages.measure.generation import Load, Timings, summarize, throughput
from stages.measure.same_text import NUM_PROMPTS, compare_text, release_memory, text_prompts
from stages.models.context_length import text_part
from stages.runtime.serving_process import ServingProcess
from stages.runtime.translation import one_line
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
MARGIN_BYTES = 4 * 1024 * 1024 * 1024
"""Of a GPU, beside weights and cache: CUDA's context, activations while vLLM profiles a run, captured graphs."""
MOST_OF_A_GPU = 0.92
"""vLLM's own choice."""


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
        logs: gets what vLLM said of each candidate that failed or lacks a figure.

    Raises:
        Transient: vLLM was lost with every candidate, or a checkpoint is out of reach.
        StageFailed: vLLM's environment is not here, or has another version.
        ExternalDataError: the same, where nothing is installed.
    """
    if runtime.device != setup.device:
        raise StageFailed(
            f"runtime=VLLM(device={runtime.device!r}), but the step computes on {setup.device}; expected the same: "
            "change it, or gpus_per_worker"
        )
    installed = locate(runtime.python, runtime.version, runtime.device)
    vocab_size = min((size for c in candidates if (size := text_part(c.config).get("vocab_size"))), default=2)
    found, lost = {}, []
    for index, candidate in enumerate(candidates):
        answer = _measure(config, installed, candidate, vocab_size, logs)
        found[candidate.name] = answer.speed
        if answer.lost:
            lost.append(answer.speed.reason)
        release_memory()
        setup.reporter.progress(index + 1, len(candidates), "models")
    if lost and len(lost) == len(candidates):
        raise Transient(f"vLLM was lost with every model, so this machine is in question: {lost[0]}")
    return found


@dataclass(frozen=True, slots=True)
class _Answer:
    """What came of one process."""

    speed: CandidateSpeed
    written: list[list[int]] | None = None
    """Its tokens after each prompt, if it is served."""
    lost: bool = False
    """Whether it took too long or went away before it was known whether it serves the candidate."""


def _measure(
    config: "Measure", installed: InstalledVLLM, candidate: Candidate, vocab_size: int, logs: dict[str, list[str]]
) -> _Answer:
    """Measure one candidate, or say why not; a process that is lost is started once more.

    Raises:
        Transient: the checkpoint is out of reach.
    """
    try:
        folder = candidate.artifact.folder(candidate.folder)
        prompts = text_prompts(folder, max_tokens=config.prompt_tokens, vocab_size=vocab_size, seed=config.seed)
        answer = _serve(config, installed, candidate, (folder, prompts, vocab_size), logs)
        if answer.lost:
            answer = _serve(config, installed, candidate, (folder, prompts, vocab_size), logs)
        if answer.written is None:
            return answer
        speed = answer.speed
        assert speed.dtype is not None
        same, reason = _compare(folder, prompts, answer.written, speed.dtype, installed.device)
        reasons = "; ".join(filter(None, (speed.reason, reason))) or None
        return _Answer(speed.model_copy(update={"same_text": same, "reason": reasons}), answer.written)
    except Transient:
        raise
    except Exception as error:  # noqa: BLE001  one family's trouble must not cost the other models their figures
        return _Answer(CandidateSpeed(runtime=_runtime(installed), reason=f"it was not measured: {one_line(error)}"))


def _serve(
    config: "Measure",
    installed: InstalledVLLM,
    candidate: Candidate,
    given: tuple[Path, list[list[int]], int],
    logs: dict[str, list[str]],
) -> _Answer:
    """Ask a process: whether it serves a candidate, as its loading and first generation say, and then how fast."""
    folder, prompts, vocab_size = given
    dtype = "auto" if config.dtype == "stored" else config.dtype  # of float32 weights vLLM makes bfloat16 itself
    variables = vllm_variables(installed.python, installed.device, num_threads=config.threads)
    speed = CandidateSpeed(runtime=_runtime(installed))
    name = f"vLLM {installed.version} on {'a CPU' if installed.device == 'cpu' else 'CUDA'}"
    with ServingProcess(installed.python, SCRIPT, environment=variables) as process:
        run = _Run(config, process, vocab_size)
        try:
            facts = run.load(folder, dtype, candidate, device=installed.device)
            written = run.generate(prompts)["tokens"]
        except StageFailed as error:
            process.close()  # so that all of what it said has been read
            logs[candidate.name] = process.log
            if isinstance(error, OutOfMemory):
                return _Answer(speed.model_copy(update={"reason": f"{name} has no memory for it: {error}"}))
            if isinstance(error, Transient):
                return _Answer(speed.model_copy(update={"reason": f"{name} was lost, twice: {error}"}), lost=True)
            return _Answer(speed.model_copy(update={"served": False, "reason": f"{name} does not serve it: {error}"}))
        figures, missing = run.figures(folder, facts)
    if missing:
        logs[candidate.name] = process.log
    found = {"served": True, "dtype": facts["dtype"], "reason": "; ".join(missing) or None, **figures}
    return _Answer(speed.model_copy(update=found), written)


def _runtime(installed: InstalledVLLM) -> str:
    return f"vllm-{installed.device}"


def _compare(
    folder: Path, prompts: list[list[int]], written: list[list[int]], dtype: str, device: str
) -> tuple[SameText | None, str | None]:
    """Compare with transformers, or say why not; another process may have the device's memory afterwards."""
    try:
        return compare_text(folder, prompts, written, dtype=dtype, device=device), None
    except Transient:
        raise
    except Exception as error:  # noqa: BLE001  a family of its own; what was measured stays
        return None, f"its text could not be compared with transformers': {one_line(error)}"


class _Run:
    """The fixed work, asked of a process."""

    def __init__(self, config: "Measure", process: ServingProcess, vocab_size: int) -> None:
        self._config, self._process, self._vocab_size = config, process, vocab_size

    def load(self, folder: Path, dtype: str, candidate: Candidate, *, device: str) -> dict[str, Any]:
        config = self._config
        context = config.prompt_tokens + config.new_tokens
        largest = max(int(config.largest_batch), NUM_PROMPTS)
        cache_bytes = _cache_bytes(text_part(candidate.config), largest * context)
        facts: dict[str, Any] = self._process.call(
            "load",
            timeout_seconds=LOAD_SECONDS,
            model=str(folder),
            dtype=dtype,
            context=context,
            batch_size=largest,
            cache_bytes=cache_bytes,
            memory_fraction=_fraction(folder, config.dtype, cache_bytes) if device == "cuda" else None,
            eager=device == "cpu",
        )
        return facts

    def generate(self, prompts: list[list[int]]) -> dict[str, Any]:
        found: dict[str, Any] = self._process.call(
            "generate", timeout_seconds=CALL_SECONDS, prompts=prompts, new_tokens=self._config.new_tokens
        )
        return found

    def figures(self, folder: Path, facts: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """Return a candidate's figures by their names, and why others are missing."""
        config, found, missing = self._config, dict[str, Any](), []
        by_batch: dict[str, float] = {}

        def latency() -> None:
            load = config.load(config.batch_size)
            found.update(summarize(self._time(load, config.warmup, config.repeats), load))
            by_batch[str(config.batch_size)] = found["tokens_per_second"]

        def batch(batch_size: int) -> None:
            load = config.load(batch_size)
            by_batch[str(batch_size)] = throughput(self._time(load, 1, config.throughput_repeats), load)

        def memory() -> None:
            found["peak_memory_bytes"] = self._peak_memory(folder, facts)

        cells = {"its latency": latency}
        cells |= {f"a batch of {size}": partial(batch, size) for size in config.throughput_batch_sizes}
        cells |= {"its peak memory": memory}
        for what, measure in cells.items():
            try:
                measure()
            except Exception as error:  # noqa: BLE001  the other cells stay
                missing.append(f"{what} was not measured: {one_line(error)}")
        largest = by_batch.get(config.largest_batch)
        return found | {"by_batch": by_batch, "throughput_tokens_per_second": largest}, missing

    def _peak_memory(self, folder: Path, facts: Mapping[str, Any]) -> int:
        """Return the bytes of the weights, of the cache that the batch fills, and of what a run allocates beside."""
        prompts = self._prompts(self._config.load(self._config.batch_size), self._config.seed)
        memory = self._process.call(
            "memory", timeout_seconds=CALL_SECONDS, prompts=prompts, new_tokens=self._config.new_tokens
        )
        weights_bytes: int = max(facts["weights_bytes"], _stored_bytes(folder, facts["dtype"]))
        return weights_bytes + int(memory["cache_bytes"]) + int(memory["peak_bytes"])

    def _time(self, load: Load, warmup: int, repeats: int) -> list[Timings]:
        runs = [self.generate(self._prompts(load, self._config.seed + index)) for index in range(warmup + repeats)]
        return [Timings(max(run["first_seconds"]), tuple(run["step_seconds"])) for run in runs[warmup:]]

    def _prompts(self, load: Load, seed: int) -> list[list[int]]:
        prompts: list[list[int]] = load.prompt(self._vocab_size, seed=seed, device="cpu").tolist()
        return prompts


def _fraction(folder: Path, dtype: str, cache_bytes: int) -> float:
    """Return the share of the GPU's memory that vLLM finds free, or does not start.

    Its own is 0.92, however small the model: another program on the card, or this process, would keep it from starting.
    """
    import torch

    weights = _stored_bytes(folder, "float32") if dtype == "float32" else _file_bytes(folder)
    total = torch.cuda.get_device_properties(0).total_memory
    return min(MOST_OF_A_GPU, (weights + cache_bytes + MARGIN_BYTES) / total)


def _file_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


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
