"""Name the device on which speed is measured: the GPU's model, or the CPU's.

Light: asks `nvidia-smi` and `/proc/cpuinfo`, not torch, so that a workflow can fill in `Measure(device=…)` before
anything starts. The name is part of the identity of a measurement: a laptop's latency is never that of an H100.
"""

import os
import platform
import shutil
import subprocess
from pathlib import Path

__all__ = ["describe_cpu", "describe_gpu"]


def describe_cpu() -> str:
    """Return the CPU's model name, or its architecture where the system does not say (as on ARM Linux)."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (names[0] if names else "") or platform.processor() or platform.machine()


def describe_gpu() -> str | None:
    """Return the name of this host's first visible NVIDIA GPU, or None where none works."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1") or shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (subprocess.SubprocessError, OSError):
        return None  # a driver without a working GPU
    names = found.stdout.strip().splitlines()
    return names[0].strip() if names else None
