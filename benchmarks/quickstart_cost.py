"""What the quickstart costs, and what it shows: seconds and memory of a first run, seconds of a second one and of a plan;
perplexities, and the gains in which the teacher and the distilled student should lead.

Memory is the largest sum of the proportional set sizes (PSS) of the command and all its processes, sampled once a
second; shared pages count once.
"""

import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

SAMPLE_SECONDS = 1.0


def summed_pss_bytes(pid: int) -> int:
    total = 0
    try:
        processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for process in processes:
        try:
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)
    return total


def measure(*argv: str) -> tuple[float, int]:
    """Run `stillhouse …` and return its seconds and peak memory in bytes."""
    began, peak = time.perf_counter(), 0
    process = subprocess.Popen([sys.executable, "-m", "workflows.cli", *argv], stdout=subprocess.DEVNULL)
    while process.poll() is None:
        peak = max(peak, summed_pss_bytes(process.pid))
        time.sleep(SAMPLE_SECONDS)
    assert process.returncode == 0, argv
    return time.perf_counter() - began, peak


def answer(*argv: str) -> tuple[float, dict[str, Any]]:
    """Run `stillhouse … --json` and return its seconds and what it says."""
    began = time.perf_counter()
    text = subprocess.run([sys.executable, "-m", "workflows.cli", *argv, "--json"], stdout=subprocess.PIPE, check=True)
    return time.perf_counter() - began, json.loads(text.stdout)


def show(document: dict[str, Any]) -> None:
    """Print what the models are worth."""
    losses = {c["name"]: c["metrics"]["final/cross_entropy"] for c in document["candidates"]}
    for name, loss in losses.items():
        metrics = next(c["metrics"] for c in document["candidates"] if c["name"] == name)
        print(f"{name:>40}: perplexity {math.exp(loss):6.1f}, {metrics['final/size_bytes'] / 1e6:.2f} MB")
    for better, worse in (("teacher", "plain"), ("distilled", "plain"), ("teacher", "distilled")):
        print(f"{better} over {worse}: {losses[worse] - losses[better]:+.3f} nats per token; asked: above 0")
    print(f"verdict: {document['verdict']['outcome']}; {'; '.join(document['verdict']['reasons'])}")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = ("--store", folder)
        first, peak = measure("run", "quickstart", *store)
        print(f"first run: {first:.0f} s, peak memory {peak / 1e9:.2f} GB (summed PSS); asked: at most 360 s, 6 GB")
        again, document = answer("run", "quickstart", *store)
        print(f"second run: {again:.1f} s, {document['executed']} steps run; asked: at most 8 s, 0 steps")
        show(document)
        plan, _ = answer("plan", "quickstart", *store)
        print(f"plan: {plan:.2f} s; asked: at most 2 s")


if __name__ == "__main__":
    main()
