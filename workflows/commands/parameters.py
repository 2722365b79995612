"""A workflow's parameters as a command's options: from its signature, its docstring and a YAML file.

`cyclopts` does the parsing; here are the joints: common options beside a workflow's own, defaults inside of nested
models, and messages without a parser's jargon.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from cyclopts import App, Parameter
from cyclopts.config import Yaml
from pydantic import BaseModel, Field, ValidationError, create_model

from stages.errors import ConfigError, nearest
from workflows.commands.find import FoundWorkflow

Options = Mapping[str, tuple[Any, Any]]
"""Option → (type, default)."""
Act = Callable[[FoundWorkflow, Mapping[str, Any], Mapping[str, Any], Sequence[str]], int]
"""Takes a workflow, its parameters, the common options and the words of the command; returns the exit code."""


def with_parameters(
    verb: str,
    found: FoundWorkflow,
    tokens: Sequence[str],
    options: Options,
    act: Act,
) -> int:
    """Parse a workflow's own parameters beside the common options, then act."""
    signature = inspect.signature(found.build)
    hints = get_type_hints(found.build, include_extras=True)
    hints.pop("return", None)
    own = [_with_defaults_inside(parameter, hints[name]) for name, parameter in signature.parameters.items()]
    if taken := sorted(set(signature.parameters) & set(options)):
        raise ConfigError(
            f"workflow {found.name!r} has a parameter {taken[0]!r}, which is an option of every workflow; rename it"
        )
    common = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)
        for name, (hint, default) in options.items()
    ]

    def command(**values: Any) -> int:
        chosen = {name: values.get(name, default) for name, (_, default) in options.items()}
        given = {
            name: _as_declared(value, signature.parameters[name])
            for name, value in values.items()
            if name not in options
        }
        return act(found, given, chosen, tokens)

    command.__signature__ = inspect.Signature([*own, *common])  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own, *common)}
    command.__doc__ = found.build.__doc__
    sub = App(
        name=f"stillhouse {verb} {found.name}",
        result_action="return_value",
        version_flags=[],
        config=_params_file(tokens, [*signature.parameters, *options]),
        default_parameter=Parameter(consume_multiple=True),  # `--documents a.txt b.txt`, as a shell's glob gives it
    )
    sub.default(command)
    result = sub(list(tokens), exit_on_error=False, print_error=False)
    return result if isinstance(result, int) else 0  # `--help` was asked for, and is printed


def _with_defaults_inside(parameter: inspect.Parameter, hint: Any) -> inspect.Parameter:
    """Return a parameter whose model's defaults are its default's fields: `--teacher.layers 6` keeps the rest."""
    default = parameter.default
    if not isinstance(default, BaseModel) or hint is not type(default):
        return parameter.replace(annotation=hint)
    fields: dict[str, Any] = {
        name: (field.rebuild_annotation(), Field(getattr(default, name), description=field.description))
        for name, field in hint.model_fields.items()
    }
    model = create_model(hint.__name__, __base__=hint, **fields)
    return parameter.replace(annotation=model, default=model(**dict(default)))


def _as_declared(value: Any, parameter: inspect.Parameter) -> Any:
    """Return a value as the class that the workflow declares, not the one that carried its defaults."""
    return type(parameter.default)(**dict(value)) if isinstance(parameter.default, BaseModel) else value


def _params_file(tokens: Sequence[str], known: Sequence[str]) -> list[Yaml]:
    """Return the source of parameters that `--params FILE` names."""
    for index, token in enumerate(tokens):
        name, _, value = token.partition("=")
        if name == "--params":
            path = Path(value or (tokens[index + 1] if index + 1 < len(tokens) else ""))
            if not path.is_file():
                raise ConfigError(
                    f"--params names {str(path)!r}, which is not a file; expected a YAML file of the workflow's "
                    "parameters"
                )
            _check_yaml(path, known)
            return [Yaml(path, must_exist=True, use_commands_as_keys=False)]
    return []


def _check_yaml(path: Path, known: Sequence[str]) -> None:
    """Refuse a file that holds anything but values of known parameters."""
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"the parameters' file {str(path)!r} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(
            f"the parameters' file {str(path)!r} holds {values!r}, expected `name: value` for each parameter"
        )
    for name in map(str, values):
        if name.replace("-", "_") not in known:
            raise ConfigError(
                f"the parameters' file {str(path)!r} has {name!r}, which is no parameter{nearest(name, list(known))}"
            )


def changed_parameters(found: FoundWorkflow, parameters: Mapping[str, Any]) -> dict[str, str]:
    """Return the parameters that differ from their defaults, as words short enough for the ledger."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(found.build).parameters.items()}
    return {name: str(value)[:250] for name, value in parameters.items() if value != defaults[name]}


def format_validation_error(error: ValidationError, owner: str) -> str:
    """Return what pydantic found wrong with a value of `owner` (a stage, or `--teacher`) in one line."""
    return "; ".join(_sentence(problem, owner) for problem in error.errors())


def _sentence(problem: Mapping[str, Any], owner: str) -> str:
    where = ".".join([owner, *map(str, problem["loc"])])
    where = where.replace("_", "-") if owner.startswith("--") else where
    text = f"{where}: " + str(problem["msg"]).removeprefix("Value error, ")
    return text + ("" if problem["type"] in ("missing", "value_error") else f"; got {problem['input']!r}")
