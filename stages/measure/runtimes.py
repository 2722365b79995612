"""The runtimes that speed can be measured in, as config: which one, and what of it is identity. Light: no torch."""

from typing import Any, Literal

from pydantic import Field

from stages.contract import Config, ExternalData
from stages.errors import ConfigError, ExternalDataError
from stages.models.serving import RuntimeChoice
from stages.runtime.vllm_environment import locate

__all__ = ["VLLM", "MeasuredRuntime", "Transformers", "measured_runtime", "on_device"]


class Transformers(Config):
    """Plain transformers, in a process of ours: all models resident, their runs interleaved."""


class VLLM(ExternalData):
    """vLLM, in an environment of its own; its version and build are identity, where it lies is not."""

    device: Literal["cpu", "cuda"]
    """The kind of device that it is built for, and runs on."""
    python: str | None = None
    """Interpreter of an environment that has vLLM; None looks where `stillhouse runtimes install vllm` put it."""
    version: str | None = Field(None, pattern=r"^\d+\.\d+")
    """The version that it must be; None takes what is found where the workflow is planned. With a version it need not
    be there, but only where the step runs."""

    def identity(self) -> dict[str, Any]:
        """Return the version and the kind of device.

        Raises:
            ExternalDataError: no version is named, and none is found.
        """
        return {"vllm": self.version or locate(self.python, None, self.device).version, "device": self.device}

    def resolved(self) -> "VLLM":
        """Return it with its version and, where it is found here, its interpreter."""
        try:
            found = locate(self.python, self.version, self.device)
        except ExternalDataError:
            if self.version is None:
                raise
            return self
        return self.model_copy(update={"python": found.python, "version": found.version})


MeasuredRuntime = Transformers | VLLM


def on_device(runtime: RuntimeChoice | None, device: Literal["cpu", "cuda"]) -> RuntimeChoice | None:
    """Return a runtime with its device: `vllm` on a CPU is `vllm-cpu`.

    Raises:
        ConfigError: it is for another device than speed is measured on.
    """
    here: RuntimeChoice = "vllm-cpu" if device == "cpu" else "vllm-cuda"
    if runtime in ("vllm-cpu", "vllm-cuda") and runtime != here:
        place = "CPUs, since no step takes GPUs" if device == "cpu" else "GPUs, since steps take them"
        raise ConfigError(
            f"gate.runtime is {runtime!r}, but speed is measured on {place}; expected 'vllm' or {here!r}: change it, "
            "or what a step takes (--hardware.gpus-per-worker, where the workflow has it)"
        )
    return here if runtime == "vllm" else runtime


def measured_runtime(runtime: RuntimeChoice | None) -> MeasuredRuntime:
    """Return what speed is measured in where a gate names a runtime with its device."""
    if runtime == "vllm-cpu":
        return VLLM(device="cpu")
    return VLLM(device="cuda") if runtime == "vllm-cuda" else Transformers()
