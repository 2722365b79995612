"""Checkpoints in the real vLLM on this CPU, beside transformers where it runs them in their own format.

Usage: python -m benchmarks.serving_speed FOLDER… — each a checkpoint as the hub lays it out, in a folder `model`'s parent,
e.g. an artifact's `out/<epoch>`. Needs `stillhouse runtimes install vllm`. Prints one Markdown row a checkpoint.
"""

import sys
from pathlib import Path

from stages.candidates import Candidate
from stages.formats.speed import CandidateSpeed
from stages.measure.device import describe_cpu
from stages.measure.runtimes import VLLM
from stages.measure.stage import Measure, measure
from stages.models.serving import served_by
from stages.runtime.workers import WorkerSetup
from tests.fakes import RecordingReporter, artifact_of

HEADINGS = (
    "checkpoint",
    "MB",
    "by rule",
    "vLLM",
    "first token ms",
    "ms/token p50 (p95)",
    "tokens/s at 1; 8",
    "memory MB",
    "text",
)
THREADS = 2


def main(folders: list[Path]) -> None:
    candidates = [Candidate(path.name, artifact_of("model", path.parent), path.name) for path in folders]
    setup = WorkerSetup(RecordingReporter(), THREADS, "cpu")
    config = Measure(device=describe_cpu(), threads=THREADS, prompt_tokens=64, new_tokens=32, repeats=5)
    print(f"| {' | '.join(HEADINGS)} |\n|{' --- |' * len(HEADINGS)}")
    for runtime in (VLLM(device="cpu"), config.runtime):
        for candidate in candidates:
            found, _ = measure(config.model_copy(update={"runtime": runtime}), [candidate], setup)
            print(row(candidate, found[candidate.name]), flush=True)


def row(candidate: Candidate, speed: CandidateSpeed) -> str:
    cells = [candidate.name, f"{candidate.size_bytes / 1e6:.2f}", served_by(candidate.config)["vllm-cpu"].answer]
    if not speed.figures:
        return f"| {' | '.join([*cells, (speed.reason or '')[:160]])} |"
    figures = (
        f"{speed.runtime} {speed.dtype}",
        f"{speed.prefill_p50_ms:.1f}",
        f"{speed.latency_p50_ms:.2f} ({speed.latency_p95_ms:.2f})",
        "; ".join(f"{value:.0f}" for value in speed.by_batch.values()),
        f"{(speed.peak_memory_bytes or 0) / 1e6:.2f}",
        speed.same_text.text if speed.same_text else "–",
    )
    return f"| {' | '.join([*cells, *figures])} |"


if __name__ == "__main__":
    main([Path(folder) for folder in sys.argv[1:]])
