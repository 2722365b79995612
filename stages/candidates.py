"""Candidates: the models that could ship, among the artifacts that a step was given, each with one name.

A `model` artifact is one candidate, named as its key. A `search` artifact holds one candidate for each finalist,
named `<base>.<scheme>`, where the base is the key of the model artifact that was quantized (or the search's own key,
where that model was not given). Scores and speed meet by these names.

A candidate that was derived from another one has a base, however it was derived: the limits to the base and the
figures about it follow from that alone.

Does not: load or judge a model.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stages.contract import Artifact
from stages.errors import StageFailed
from stages.formats.derivation import Derivation
from stages.formats.search import Search

__all__ = ["NOT_DERIVED", "Candidate", "read_candidates"]

NOT_DERIVED = "model"
"""The kind of a candidate that was trained or given, not made from another one."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One checkpoint in an artifact."""

    name: str
    artifact: Artifact
    folder: str
    """The checkpoint's logical folder in the artifact: `model` or `finalists/<scheme>`."""
    kind: str = NOT_DERIVED
    """How it was made: `model`, `quantized`, `pruned`, …; for people, nothing depends on it."""
    base_fingerprint: str | None = None
    """Fingerprint of the artifact that it was derived from, if any."""
    base: str | None = None
    """Name of that candidate, where it is among those given or is the reference."""
    method: str | None = None
    """How it was derived, e.g. a scheme's name."""

    @property
    def size_bytes(self) -> int:
        """Bytes of the weights on disk: the folder's safetensors files."""
        return sum(file.size_bytes for file in self.artifact.below(f"{self.folder}/*.safetensors"))

    @property
    def uri_prefix(self) -> str:
        """URI of the folder that `from_pretrained` takes (once it is on a local disk)."""
        (config,) = self.artifact.below(f"{self.folder}/config.json")
        return config.uri.removesuffix("/config.json")

    @property
    def config(self) -> dict[str, Any]:
        """The checkpoint's `config.json`, as transformers wrote it."""
        values: dict[str, Any] = json.loads(self.artifact.read_bytes(f"{self.folder}/config.json"))
        return values


def read_candidates(models: Mapping[str, Artifact]) -> list[Candidate]:
    """Return the candidates among named artifacts: models in the order given, then the finalists of searches.

    Raises:
        StageFailed: two candidates would have one name, or a checkpoint has no config or no safetensors weights.
    """
    single = {key: artifact for key, artifact in models.items() if artifact.kind == "model"}
    names = {artifact.fingerprint: key for key, artifact in reversed(single.items())}
    found = [_read_model(key, artifact, names) for key, artifact in single.items()]
    for key, artifact in models.items():
        if artifact.kind == "search":
            found += _read_finalists(key, artifact, names)
    _check_candidates(found)
    return found


def _read_model(key: str, artifact: Artifact, names: Mapping[str, str]) -> Candidate:
    if not artifact.below(Derivation.FILE):
        return Candidate(key, artifact, "model")
    derived = Derivation.read(artifact)
    return Candidate(key, artifact, "model", derived.kind, derived.base, names.get(derived.base), derived.method)


def _read_finalists(key: str, artifact: Artifact, names: Mapping[str, str]) -> list[Candidate]:
    search = Search.read(artifact)
    base = names.get(search.base)
    return [
        Candidate(f"{base or key}.{each.scheme}", artifact, each.folder, "quantized", search.base, base, each.scheme)
        for each in search.finalists
    ]


def _check_candidates(candidates: list[Candidate]) -> None:
    names = [candidate.name for candidate in candidates]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise StageFailed(
            f"several candidates are named {', '.join(doubled)}; expected one finalist of each scheme for each base: "
            "pass one of these searches only, or name their schemes differently"
        )
    for candidate in candidates:
        for name in ("config.json", "*.safetensors"):
            if not candidate.artifact.below(f"{candidate.folder}/{name}"):
                raise StageFailed(
                    f"candidate {candidate.name!r} has no {candidate.folder}/{name}; expected a checkpoint as the hub "
                    "lays it out, with safetensors weights"
                )
