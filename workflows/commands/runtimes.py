"""`stillhouse runtimes`: runtimes that serve models from environments of their own, listed and installed."""

from typing import Literal

from cyclopts import App

from stages.runtime.vllm_environment import find_installed, install
from workflows.commands.options import Json
from workflows.commands.output import print_fields, print_json, say

runtimes = App(name="runtimes", help="List the runtimes that are installed beside stillhouse, and install them.")


@runtimes.default
def list_runtimes(*, json: Json = False) -> None:
    """List the runtimes that `install` made: what a model can be measured in besides transformers."""
    found = {f"vllm {one.version} on {one.device}": one.python for one in find_installed()}
    if json or found:
        print_fields(found, as_json=json)
    else:
        say("none: stillhouse runtimes install vllm")


@runtimes.command(name="install")
def install_runtime(name: Literal["vllm"], *, device: Literal["cpu", "cuda"] = "cpu", json: Json = False) -> None:
    """Install a runtime into an environment of its own below the cache; done once, again changes nothing.

    Args:
        name: the runtime.
        device: the kind of device that it is built for; vLLM has a build for each.
    """
    made, new = install(device, say=(lambda line: None) if json else say)
    if json:
        print_json({"name": name, "version": made.version, "device": made.device, "python": made.python, "new": new})
    else:
        say(f"{name} {made.version} on {made.device} {'is installed' if new else 'was there'}: {made.python}")
