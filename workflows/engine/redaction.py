"""Hides secrets from events, MLflow and logs: what looks like one, and what this process's environment says is one.

Promises: the user name and password of a URI, key ids and tokens of known shape, `password=…` and signed-URL
parameters, and the value of every environment variable whose name speaks of a token, secret, password or key, are
replaced by `***`. Does not: find a secret of unknown shape that no variable holds.
"""

import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"
MIN_SECRET_CHARACTERS = 8
"""Shorter values (`TOKENIZERS_PARALLELISM=false`) are settings; hiding them would spoil ordinary text."""

_SPEAKING_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|KEY|CREDENTIAL", re.IGNORECASE)
_WORDS = (
    r"password|passwd|secret|token|api[_-]?key|access[_-]?key|sig|signature"
    r"|x-amz-(?:signature|credential|security-token)"
)
_SHAPES: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"(?P<keep>[A-Za-z][A-Za-z0-9+.\-]*://)[^\s/@'\"<>]+@"), rf"\g<keep>{HIDDEN}@"),
    (re.compile(rf"(?P<keep>(?<![A-Za-z0-9_])(?:{_WORDS})=)[^\s&'\",;]{{4,}}", re.IGNORECASE), rf"\g<keep>{HIDDEN}"),
    (re.compile(r"(?P<keep>\b(?:Bearer|Basic)\s+)[A-Za-z0-9._~+/=\-]{8,}"), rf"\g<keep>{HIDDEN}"),
    (re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"), HIDDEN),
    (re.compile(r"\bhf_[A-Za-z0-9]{16,}"), HIDDEN),
    (re.compile(r"\bgh[opsru]_[A-Za-z0-9]{20,}"), HIDDEN),
)


def secrets_of(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Return the secret values of an environment, longest first; names of existing files are none."""
    named = {
        value
        for name, value in environ.items()
        if len(value) >= MIN_SECRET_CHARACTERS and _SPEAKING_NAME.search(name) and not os.path.exists(value)
    }
    return tuple(sorted(named, key=len, reverse=True))


def redacted(text: str, secrets: tuple[str, ...] | None = None) -> str:
    """Return a text with what is known to be secret, by default by `os.environ`, or looks like it replaced by `***`."""
    for secret in secrets_of(os.environ) if secrets is None else secrets:
        text = text.replace(secret, HIDDEN)
    for shape, replacement in _SHAPES:
        text = shape.sub(replacement, text)
    return text


def redacted_tree(value: Any, secrets: tuple[str, ...] | None = None) -> Any:
    """Return plain JSON with every string in it redacted; the keys of mappings stay."""
    secrets = secrets_of(os.environ) if secrets is None else secrets
    if isinstance(value, str):
        return redacted(value, secrets)
    if isinstance(value, Mapping):
        return {key: redacted_tree(item, secrets) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redacted_tree(item, secrets) for item in value]
    return value
