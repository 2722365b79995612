"""Runs inside vLLM's own environment: answers requests of `serving_process.py`, one JSON document a line.

Standard input has `{"id", "call", "arguments"}`, standard output `{"id", "result"}` or `{"id", "error"}`. Whatever vLLM
prints goes to standard error. The end of the input ends the process and all that it started, at once: who held the
other end is gone, however it went. Imports nothing of stillhouse: that environment has none of its packages.
"""

import contextlib
import json
import os
import queue
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

MEMORY_SIGNS = (
    "out of memory",
    "can't allocate memory",
    "No available memory for the cache blocks",
    "less than desired",
)
MESSAGE_CHARACTERS = 600


class Engine:
    """One model, loaded."""

    def __init__(
        self,
        model: str,
        *,
        dtype: str,
        context: int,
        batch_size: int,
        cache_bytes: int,
        memory_fraction: float | None,
        eager: bool,
    ) -> None:
        """Load a checkpoint.

        Args:
            model: its folder.
            dtype: vLLM's name of the type that it computes in.
            context: tokens of the longest sequence; rotary positions are extended to it.
            batch_size: sequences that run at once, at most.
            cache_bytes: of the key-value cache.
            memory_fraction: of a GPU's memory that must be free when it starts; of a given cache nothing else depends
                on it. None is vLLM's own.
            eager: whether graphs are neither compiled nor captured.
        """
        from vllm import LLM

        longest = _longest(model)
        extended = {"max_position_embeddings": context} if longest and context > longest else {}
        fraction = {} if memory_fraction is None else {"gpu_memory_utilization": memory_fraction}
        self.llm = LLM(
            model=model,
            dtype=dtype,
            max_model_len=context,
            max_num_seqs=batch_size,
            kv_cache_memory_bytes=cache_bytes,
            enforce_eager=eager,
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
            trust_remote_code=False,
            disable_log_stats=True,
            hf_overrides=extended,
            seed=0,
            **fraction,
        )
        self.num_requests = 0

    def facts(self) -> dict[str, Any]:
        """Return the type that it computes in, and the bytes of its weights as they were loaded."""
        (weights,) = self.llm.apply_model(_tensor_bytes)
        return {"dtype": str(self.llm.llm_engine.model_config.dtype).removeprefix("torch."), "weights_bytes": weights}

    def generate(self, prompts: list[list[int]], *, new_tokens: int) -> dict[str, Any]:
        """Generate greedily after prompts that arrive together, and time it; the end-of-text token is ignored.

        Returns:
            the tokens of each; the seconds from the arrival to the first token of each; the seconds of each step after
            every one had its first.
        """
        from vllm import SamplingParams

        engine = self.llm.llm_engine
        sampling = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        tokens: dict[str, list[int]] = {}
        first: dict[str, float] = {}
        steps: list[float] = []
        names = [str(self.num_requests + index) for index in range(len(prompts))]
        self.num_requests += len(prompts)
        start = time.perf_counter()
        try:
            for name, prompt in zip(names, prompts, strict=True):
                engine.add_request(name, {"prompt_token_ids": prompt}, sampling)
            before = start
            while engine.has_unfinished_requests():
                decoding = len(first) == len(names)
                outputs = engine.step()
                now = time.perf_counter()
                for output in outputs:
                    tokens[output.request_id] = list(output.outputs[0].token_ids)
                    first.setdefault(output.request_id, now - start)
                if decoding and outputs:
                    steps.append(now - before)
                before = now
        except Exception:
            with contextlib.suppress(Exception):  # the engine may have ended with it
                engine.abort_request(names)  # or the next batch would go on with these
            raise
        return {
            "tokens": [tokens[name] for name in names],
            "first_seconds": [first[name] for name in names],
            "step_seconds": steps,
        }

    def memory(self, prompts: list[list[int]], *, new_tokens: int) -> dict[str, int]:
        """Return the bytes of the cache that these sequences fill, and the most that a run allocates beside it."""
        length = max(map(len, prompts)) + new_tokens
        (specs,) = self.llm.collective_rpc("get_kv_cache_spec")
        blocks = [spec.page_size_bytes * -(-length // spec.block_size) for spec in specs.values()]
        return {"cache_bytes": len(prompts) * sum(blocks), "peak_bytes": self._peak(prompts, new_tokens)}

    def _peak(self, prompts: list[list[int]], new_tokens: int) -> int:
        import torch

        if torch.cuda.is_available():
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            self.generate(prompts, new_tokens=new_tokens)
            return int(torch.cuda.max_memory_allocated()) - int(before)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
            self.generate(prompts, new_tokens=new_tokens)
        events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
        held = most = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            held += event.nbytes()
            most = max(most, held)
        return most


def _tensor_bytes(model: Any) -> int:
    """Return the bytes of a model's weights and buffers; tensors that share memory count once."""
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensors.values())


def _longest(model: str) -> int | None:
    """Return the longest context that a checkpoint with rotary positions names; None for one with other positions."""
    config = json.loads((Path(model) / "config.json").read_text())
    text = config.get("text_config") or config
    rotary = any(key.startswith("rope") for key in text)
    return text.get("max_position_embeddings") if rotary else None


def _describe(error: BaseException) -> dict[str, str]:
    """Return an error as the other side shows it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and "validation error" in lines[0]:  # pydantic's own heading
        lines = lines[1:]
    text = " ".join(lines)
    starved = type(error).__name__ in ("OutOfMemoryError", "MemoryError") or any(sign in text for sign in MEMORY_SIGNS)
    kind = "memory" if starved else "failed"
    return {"kind": kind, "message": f"{type(error).__name__}: {text[:MESSAGE_CHARACTERS] or 'no message'}"}


def _requests() -> "queue.Queue[dict[str, Any]]":
    """Return what arrives on standard input; its end ends this process and all that it started."""
    found: queue.Queue[dict[str, Any]] = queue.Queue()

    def read() -> None:
        for line in sys.stdin:
            found.put(json.loads(line))
        os.killpg(os.getpgid(0), signal.SIGKILL)  # it leads a group of its own

    threading.Thread(target=read, daemon=True).start()
    return found


def main() -> None:
    """Answer requests until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM prints to standard output
    requests, engine = _requests(), None
    while True:
        request = requests.get()
        try:
            if request["call"] == "load":
                engine = Engine(**request["arguments"])
                result = engine.facts()
            else:
                result = getattr(engine, request["call"])(**request["arguments"])
            answer = {"id": request["id"], "result": result}
        except Exception as error:  # noqa: BLE001  the border of the process: the other side decides
            import traceback

            traceback.print_exc()
            answer = {"id": request["id"], "error": _describe(error)}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
