"""The script that runs in vLLM's environment, with an engine in vLLM's place."""

import sys
from types import SimpleNamespace

import pytest

from stages.runtime.vllm_worker import Engine


class FakeEngine:
    """Gives each request one token a step; the first step fails."""

    def __init__(self) -> None:
        self.waiting: dict[str, int] = {}
        self.failures = 1

    def add_request(self, name, prompt, sampling) -> None:
        self.waiting[name] = sampling.max_tokens

    def has_unfinished_requests(self) -> bool:
        return bool(self.waiting)

    def abort_request(self, names) -> None:
        for name in names:
            del self.waiting[name]

    def step(self):
        if self.failures:
            self.failures -= 1
            raise RuntimeError("CUDA out of memory")
        done = {name: 3 - left for name, left in self.waiting.items()}
        self.waiting = {name: left - 1 for name, left in self.waiting.items() if left > 1}
        return [
            SimpleNamespace(request_id=name, outputs=[SimpleNamespace(token_ids=range(num))])
            for name, num in done.items()
        ]


def test_batch_that_fails_leaves_nothing_to_the_next(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=SimpleNamespace))
    engine = Engine.__new__(Engine)
    engine.llm, engine.num_requests = SimpleNamespace(llm_engine=FakeEngine()), 0
    with pytest.raises(RuntimeError, match="CUDA out of memory"):
        engine.generate([[1]] * 8, new_tokens=2)
    found = engine.generate([[1], [2]], new_tokens=2)
    assert (len(found["tokens"]), len(found["first_seconds"]), len(found["step_seconds"])) == (2, 2, 1)
