"""A workflow's parameters as a command's options: from its signature, its docstring and a YAML file.

`cyclopts` does the parsing; here are the joints: common options beside a workflow's own, defaults inside of nested
models, and messages without a parser's jargon.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml
from cyclopts import App, Parameter
from cyclopts.config import Dict
from pydantic import BaseModel, Field, ValidationError, create_model

from stages.errors import ConfigError, nearest
from workflows.commands.find import FoundWorkflow
from workflows.commands.options import WorkflowOptions

OPTIONS = "options_of_every_workflow"
"""The parameter that holds the common options; the command line never sees its name."""

Chosen = TypeVar("Chosen", bound=WorkflowOptions)


def with_parameters(
    verb: str,
    found: FoundWorkflow,
    tokens: Sequence[str],
    options: Chosen,
    act: Callable[[FoundWorkflow, Mapping[str, Any], Chosen], int | None],
) -> int | None:
    """Parse a workflow's own parameters beside the common options, which have defaults, then act on both."""
    signature = inspect.signature(found.build)
    hints = get_type_hints(found.build, include_extras=True)
    own = [_with_defaults_inside(parameter, hints[name]) for name, parameter in signature.parameters.items()]
    names = [field.name for field in fields(options)]
    if taken := sorted(set(signature.parameters) & {*names, OPTIONS}):
        raise ConfigError(
            f"workflow {found.name!r} has a parameter {taken[0]!r}, which is an option of every workflow; rename it"
        )
    common = inspect.Parameter(OPTIONS, inspect.Parameter.KEYWORD_ONLY, default=options, annotation=type(options))

    def command(**values: Any) -> int | None:
        chosen = values.pop(OPTIONS, options)
        for name, value in values.items():
            if isinstance(default := signature.parameters[name].default, BaseModel):
                values[name] = type(default)(**dict(value))  # not of the class that carried its defaults
        return act(found, values, chosen)

    command.__signature__ = inspect.Signature([*own, common])  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own, common)}
    command.__doc__ = found.build.__doc__
    sub = App(
        name=f"stillhouse {verb} {found.name}",
        result_action="return_value",
        suppress_keyboard_interrupt=False,
        version_flags=[],
        config=_params_file(tokens, [*signature.parameters, *names]),
        default_parameter=Parameter(consume_multiple=True),  # `--documents a.txt b.txt`, as a shell's glob gives it
    )
    sub.default(command)
    result: int | None = sub(list(tokens), exit_on_error=False, print_error=False)
    return result


def _with_defaults_inside(parameter: inspect.Parameter, hint: Any) -> inspect.Parameter:
    """Return a parameter whose model's defaults are its default's fields: `--teacher.layers 6` keeps the rest."""
    default = parameter.default
    if not isinstance(default, BaseModel) or hint is not type(default):
        return parameter.replace(annotation=hint)
    changed: dict[str, Any] = {
        name: (field.rebuild_annotation(), Field(getattr(default, name), description=field.description))
        for name, field in hint.model_fields.items()
    }
    model = create_model(hint.__name__, __base__=hint, **changed)
    return parameter.replace(annotation=model, default=model(**dict(default)))


def _params_file(tokens: Sequence[str], known: Sequence[str]) -> list[Dict]:
    """Return the source of parameters that `--params FILE` names."""
    index = next((index for index, token in enumerate(tokens) if token.partition("=")[0] == "--params"), None)
    if index is None:
        return []
    path = Path(tokens[index].partition("=")[2] or "".join(tokens[index + 1 : index + 2]))
    if not path.is_file():
        raise ConfigError(
            f"--params names {str(path)!r}, which is not a file; expected a YAML file of the workflow's parameters"
        )
    what = f"the parameters' file {str(path)!r}"
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{what} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{what} holds {values!r}, expected `name: value` for each parameter")
    for name in map(str, values):
        if name.replace("-", "_") not in known:
            raise ConfigError(f"{what} has {name!r}, which is no parameter{nearest(name, list(known))}")
    return [Dict(values, source=str(path), use_commands_as_keys=False)]


def changed_parameters(found: FoundWorkflow, parameters: Mapping[str, Any]) -> dict[str, str]:
    """Return the parameters that differ from their defaults, as strings short enough for MLflow's params."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(found.build).parameters.items()}
    return {name: str(value)[:250] for name, value in parameters.items() if value != defaults[name]}


def format_validation_error(error: ValidationError, owner: str) -> str:
    """Return what pydantic found wrong with a value of `owner` (a stage, or `--teacher`) in one line."""
    found = []
    for problem in error.errors():
        where = ".".join([owner, *map(str, problem["loc"])])
        where = where.replace("_", "-") if owner.startswith("--") else where
        got = "" if problem["type"] in ("missing", "value_error") else f"; got {problem['input']!r}"
        found.append(f"{where}: {problem['msg'].removeprefix('Value error, ')}{got}")
    return "; ".join(found)
