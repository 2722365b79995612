"""`derived.json`: of a model that was made from another one (pruned, merged, …), which one and how.

A `model` artifact may hold it beside its checkpoint; a `search` says the same of its finalists in `search.json`.
"""

from typing import ClassVar

from stages.formats.json_format import JsonFormat

__all__ = ["Derivation"]


class Derivation(JsonFormat):
    """`derived.json`."""

    FILE: ClassVar = "derived.json"

    base: str
    """Fingerprint of the artifact that it was derived from."""
    kind: str
    """How it was made: `pruned`, `merged`, …"""
    method: str
    """The same in short, with its setting, e.g. `width-50`: an axis of plots."""
