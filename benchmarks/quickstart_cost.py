"""What the quickstart costs: seconds and memory of a first run, seconds of a second one and of a plan.

Memory is the largest sum of the proportional set sizes (PSS) of the command and all its processes, sampled once a
second; shared pages count once.
"""

import json
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


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = ("--store", folder)
        first, peak = measure("run", "quickstart", *store)
        print(f"first run: {first:.0f} s, peak memory {peak / 1e9:.2f} GB (summed PSS); asked: at most 300 s, 6 GB")
        again, document = answer("run", "quickstart", *store)
        print(f"second run: {again:.1f} s, {document['executed']} steps run; asked: at most 8 s, 0 steps")
        plan, _ = answer("plan", "quickstart", *store)
        print(f"plan: {plan:.2f} s; asked: at most 2 s")


if __name__ == "__main__":
    main()
