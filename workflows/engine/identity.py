"""Step → fingerprint: the only place that knows what enters identity.

fingerprint = sha256 of canonical JSON of: schema version, the stage's class and `REVISION`, its config, and the
fingerprints of its inputs. A class enters by module and qualified name (a user's own file is the module
`stillhouse_user_<path in its project>`), so that a user's `Train` is not ours. Not in it: the step's name, resources,
retries, paths, the store, code, time, hardware.
Equal across processes, hosts, hash seeds, store roots and dict order. What has no stable form is refused.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Any, NewType

from pydantic import BaseModel

from stages.contract import ExternalData
from stages.errors import ConfigError, ExternalDataError
from workflows.engine.graph import ExternalHandle, Handle, Step, Workflow

Fingerprint = NewType("Fingerprint", str)

SCHEMA = 2
"""Raised when the canonical form below changes: every fingerprint changes with it."""


@dataclass(frozen=True, slots=True)
class Identity:
    """A fingerprint and the record that it is the hash of."""

    fingerprint: Fingerprint
    record: Mapping[str, Any]

    @property
    def inputs(self) -> Mapping[str, str]:
        """Input → fingerprint."""
        inputs: Mapping[str, str] = self.record["inputs"]
        return inputs


@dataclass(frozen=True, slots=True)
class Unknown:
    """Why a step has no fingerprint yet: data from outside is out of reach, for it or for what it needs."""

    reason: str
    own: bool
    """Whether the data is this step's own, rather than that of a step before it."""


def canonical(value: Any, where: str = "config") -> Any:
    """Return plain JSON for a config value.

    Raises:
        ConfigError: the value has no stable form (a callable, a path, a NaN, an object with a default repr).
        ExternalDataError: data from outside is missing or out of reach.
    """
    if value is None or (isinstance(value, bool | int | str) and not isinstance(value, Enum)):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ConfigError(f"{where} is {value}, which has no stable form; use None or a finite number")
        return value
    if isinstance(value, Enum):
        return canonical(value.value, where)
    if isinstance(value, ExternalData):
        return {"external": type_name(type(value)), **value.identity()}
    if isinstance(value, BaseModel):
        fields = {name: canonical(getattr(value, name), f"{where}.{name}") for name in type(value).model_fields}
        return {"type": type_name(type(value)), **fields}
    if isinstance(value, list | tuple):
        return [canonical(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, Mapping):
        return {str(key): canonical(item, f"{where}[{key!r}]") for key, item in sorted(value.items())}
    if isinstance(value, frozenset | set):
        return sorted(canonical(item, where) for item in value)
    raise ConfigError(
        f"{where} is a {type(value).__name__}, which has no stable form, so a result could not be found again; "
        "use a name or number instead, nest a frozen Config, or wrap data from outside in an ExternalData"
    )


def type_name(kind: type) -> str:
    """Return a class's module and qualified name."""
    return f"{kind.__module__}.{kind.__qualname__}"


def _hash(record: Mapping[str, Any]) -> Identity:
    text = json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return Identity(Fingerprint(hashlib.sha256(text.encode()).hexdigest()), record)


def external_identity(external: ExternalHandle) -> Identity:
    """Return the identity of a checkpoint from outside."""
    return _hash({"schema": SCHEMA, "kind": external.kind, "checkpoint": canonical(external.checkpoint, external.name)})


def step_identity(step: Step, inputs: Mapping[str, Any]) -> Identity:
    """Return a step's identity from its stage and the fingerprints of its inputs."""
    config = canonical(step.stage)
    stage = config.pop("type")
    revision = step.stage.REVISION
    return _hash({"schema": SCHEMA, "stage": stage, "revision": revision, "config": config, "inputs": dict(inputs)})


def identities(workflow: Workflow) -> dict[str, Identity | Unknown]:
    """Return every step's identity, or why it cannot be known."""
    found: dict[str, Identity | Unknown] = {}

    @cache
    def external(source: ExternalHandle) -> Identity | Unknown:
        try:
            return external_identity(source)
        except ExternalDataError as error:
            return Unknown(str(error), own=True)

    for step in workflow.in_order():
        known = {name: found[s.step] if isinstance(s, Handle) else external(s) for name, s in step.sources()}
        found[step.name] = _identify(step, known)
    return found


def _identify(step: Step, inputs: Mapping[str, Identity | Unknown]) -> Identity | Unknown:
    fingerprints = {}
    for name, source in step.sources():
        known = inputs[name]
        if isinstance(known, Unknown):
            return Unknown(f"waits for {source.step}", own=False) if isinstance(source, Handle) else known
        fingerprints[name] = known.fingerprint
    try:
        return step_identity(step, fingerprints)
    except ExternalDataError as error:
        return Unknown(str(error), own=True)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return one sentence for each field that differs between two identity records."""
    found = []
    for key in sorted({*old, *new}):
        before, after, name = old.get(key), new.get(key), f"{prefix}{key}"
        if before == after:
            continue
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += differences(before, after, f"{name}.")
        elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
            first, second = ({f"[{i}]": value for i, value in enumerate(each)} for each in (before, after))
            found += differences(first, second, name)
        elif key not in old or key not in new:
            found.append(f"{name} {'added' if key not in old else 'removed'}")
        else:
            found.append(f"{name}: {_short(before)} → {_short(after)}")
    return found


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:40]}…{text[-12:]}"
