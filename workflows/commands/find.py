"""Finds what a command names: a workflow in `workflows/` or in a user's own file, a store, a run."""

import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import ValidationError

from stages.errors import ConfigError, StillhouseError, nearest
from workflows.engine.graph import Workflow
from workflows.engine.store import ArtifactStore

HERE = Path(__file__).parent
WORKFLOWS = HERE.parent


def find_store(uri: str) -> ArtifactStore:
    """Return the store at a place; raise `ConfigError` where there is none."""
    store = ArtifactStore(uri)
    if (local := store.root.local_path()) and not local.is_dir():
        raise ConfigError(f"there is no store at {uri!r}; run a workflow first, or name its store with --store")
    return store


def find_run(store: ArtifactStore, run: str) -> Mapping[str, str]:
    """Return step → fingerprint of a run; raise one `ConfigError` that names the nearest where there is none."""
    runs = store.root / "runs"
    steps: Mapping[str, str] | None = (runs / run).find_json("steps.json")
    if steps is None:
        raise ConfigError(f"the store {store.uri} has no run {run!r}{nearest(run, runs.children())}")
    return steps


@dataclass(frozen=True, slots=True)
class FoundWorkflow:
    """A workflow's function, and the module to send to workers by value where it is a user's own file."""

    name: str
    build: Callable[..., Workflow]
    by_value: ModuleType | None

    def graph(self, parameters: Mapping[str, Any]) -> Workflow:
        """Return the workflow's graph for some parameters; raise `ConfigError` where its function is flawed."""
        try:
            made = self.build(**parameters)
        except (StillhouseError, ValidationError):
            raise
        except Exception as error:
            raise ConfigError(f"the workflow {self.name!r} cannot be built: {_describe(error)}") from error
        if not isinstance(made, Workflow):
            raise ConfigError(
                f"the workflow function {self.name!r} returned {made!r}, expected a Workflow; does it `return` one?"
            )
        return made


def _describe(error: Exception) -> str:
    """Return an error's type, message, and where in the user's file it came from."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).parent != HERE]
    own = next((frame for frame in reversed(frames) if "site-packages" not in frame.filename), None)
    where = f" ({own.filename}, line {own.lineno})" if own and not own.filename.startswith("<") else ""
    return f"{type(error).__name__}: {error}{where}"


def workflow_names() -> list[str]:
    """Return the names of the workflows that come with stillhouse."""
    return sorted(path.stem for path in WORKFLOWS.glob("*.py") if path.stem not in ("__init__", "cli"))


def find_workflow(text: str) -> FoundWorkflow:
    """Return the workflow that `NAME` or `path/to/file.py[:function]` names; an error names the nearest."""
    path, _, function = text.partition(":")
    if not path.endswith(".py"):
        if text not in workflow_names():
            raise ConfigError(
                f"there is no workflow {text!r}{nearest(text, workflow_names())}; or give a file: "
                "path/to/file.py[:function]"
            )
        return FoundWorkflow(text, _function(importlib.import_module(f"workflows.{text}"), text), None)
    file = Path(path).resolve()
    if not file.is_file():
        near = nearest(file.name, [p.name for p in file.parent.glob("*.py")]) if file.parent.is_dir() else ""
        raise ConfigError(f"there is no workflow file {path!r}{near}")
    module = _load(file)
    return FoundWorkflow(function or file.stem, _function(module, function), module)


def _load(file: Path) -> ModuleType:
    """Import a user's file under a name that shadows nothing and enters the identity of the stages in it."""
    name = user_module(file)
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(file.parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"the workflow file {str(file)!r} cannot be imported: {_describe(error)}") from error
    finally:
        sys.path.remove(str(file.parent))
    return module


def user_module(file: Path) -> str:
    """Return the module name of a user's file: by its path below its project, or its folder's name outside of one.

    A project is the nearest folder with a `.git` or `pyproject.toml`: a clone elsewhere finds the same results, and
    files of one name in two folders do not find each other's.
    """
    root = next((f for f in file.parents if (f / ".git").exists() or (f / "pyproject.toml").is_file()), None)
    path = file.relative_to(root or file.parent.parent).with_suffix("")
    return f"stillhouse_user_{path.as_posix().replace('.', '%2E')}"  # a dot would name a package, which is not there


def _function(module: ModuleType, name: str) -> Callable[..., Workflow]:
    """Return a module's workflow function of a name, or its only one where the name is empty."""
    known: dict[str, Callable[..., Workflow]] = {
        key: value
        for key, value in vars(module).items()
        if inspect.isfunction(value)
        and value.__module__ == module.__name__
        and value.__annotations__.get("return") in (Workflow, "Workflow")
    }
    file, names = module.__file__, list(known)
    if name in known or (not name and len(known) == 1):
        return known[name or names[0]]
    if name:
        raise ConfigError(
            f"{file} has no workflow function {name!r}{nearest(name, names)}; it must be declared `-> Workflow`"
        )
    if not known:
        raise ConfigError(f"{file!r} has no function that returns a Workflow (`def name(…) -> Workflow`)")
    raise ConfigError(f"{file!r} has several workflows ({', '.join(names)}); choose one: {file}:{names[0]}")
