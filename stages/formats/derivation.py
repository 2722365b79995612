"""`derived.json`: of a model that was made from another one (pruned, merged, …), which one and how.

A `model` artifact may hold it beside its checkpoint. It is written by a stage that derives a model by changing another
one's weights in place (prune, merge, …), whose result is judged by how little that changed: the gate's limits to the
base hold for it. `Train` does not write it, whatever its student started from: a trained student is meant to move away
from its origin and is judged against the teacher, so that limits to the base (0.1 nats per token) would refuse every
good one. A `search` says the same of its finalists in `search.json`.

Does not: name a finalist of a search as a base; a base is the checkpoint of a `model` artifact.
"""

from typing import ClassVar

from stages.formats.json_format import JsonFormat

__all__ = ["Derivation"]


class Derivation(JsonFormat):
    """`derived.json`."""

    FILE: ClassVar = "derived.json"

    base: str
    """Fingerprint of the `model` artifact that it was derived from."""
    kind: str
    """How it was made: `pruned`, `merged`, …"""
    method: str
    """The same in short, with its setting, e.g. `width-50`: an axis of plots."""
