"""Candidates: the models that could ship, among the artifacts that a step was given, each with one name.

A `model` artifact is one candidate, named as its key. A `search` artifact holds one candidate for each finalist,
named `<base>.<scheme>`, where the base is the key of the model artifact that was quantized (or the search's own key,
where that model was not given). Scores and speed meet by these names.

Does not: load or judge a model.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from stages.contract import Artifact
from stages.errors import StageFailed

__all__ = ["Candidate", "read_candidates"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """One checkpoint in an artifact."""

    name: str
    artifact: Artifact
    folder: str
    """The checkpoint's logical folder in the artifact: `model` or `finalists/<scheme>`."""
    kind: Literal["model", "quantized"] = "model"
    base: str | None = None
    """Name of the candidate that was quantized, where it is among those given."""
    scheme: str | None = None

    @property
    def size_bytes(self) -> int:
        """Bytes of the weights on disk: the folder's safetensors files."""
        return sum(file.size_bytes for file in self.artifact.below(f"{self.folder}/*.safetensors"))

    @property
    def uri_prefix(self) -> str:
        """URI of the folder that `from_pretrained` takes (once it is on a local disk)."""
        (config,) = self.artifact.below(f"{self.folder}/config.json")
        return config.uri.removesuffix("/config.json")


def read_candidates(models: Mapping[str, Artifact]) -> list[Candidate]:
    """Return the candidates among named artifacts: models in the order given, then the finalists of searches.

    Raises:
        StageFailed: two candidates would have one name, or a checkpoint has no config or no safetensors weights.
    """
    found = [Candidate(name, artifact, "model") for name, artifact in models.items() if artifact.kind == "model"]
    names = {candidate.artifact.fingerprint: candidate.name for candidate in reversed(found)}
    for key, artifact in models.items():
        if artifact.kind != "search":
            continue
        search = artifact.read_json("search.json")
        base = names.get(search["base"])
        for finalist in search["finalists"]:
            scheme = finalist["scheme"]
            name = f"{base or key}.{scheme}"
            found.append(Candidate(name, artifact, finalist["folder"], "quantized", base, scheme))
    _check_candidates(found)
    return found


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
