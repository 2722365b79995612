"""What a commit's manifest says: its files, what they were made from and by, and what that took."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from stages.contract import Kind, Resources
from stages.errors import ConfigError
from stages.formats.json_format import FormatModel

SCHEMA = 2
"""Raised with each change of the fields below that another version could not read."""


class ManifestFile(FormatModel):
    """One file of an artifact."""

    name: str
    """Logical name in the artifact."""
    path: str
    """Where it lies, relative to the artifact's folder: `out/<epoch>/<name>`."""
    size_bytes: int
    sha256: str


class InputCommit(FormatModel):
    """The commit that an input was read from."""

    fingerprint: str
    generation: int
    """0 for data from outside."""


class Provenance(FormatModel):
    """Evidence about where a result came from: recorded, never identity."""

    commit: str
    """The repository's commit; `unknown` outside of a checkout."""
    code_digest: str
    packages: dict[str, str]
    python: str
    host: str
    platform: str


class Manifest(FormatModel):
    """One commit of an artifact."""

    fingerprint: str
    generation: int
    epoch: int
    kind: Kind
    stage: str
    step: str
    workflow: str
    run: str
    files: tuple[ManifestFile, ...]
    metrics: dict[str, float]
    identity: dict[str, Any]
    """The record that the fingerprint is the hash of."""
    inputs: dict[str, InputCommit]
    resources: Resources
    provenance: Provenance
    seconds: float
    """Wall-clock seconds of the attempt."""
    peak_memory_bytes: int
    created: float
    """Unix time."""

    def outdated_input(self, inputs: Mapping[str, InputCommit]) -> str | None:
        """Return an input of which this was made from another commit than the given one; None where it is current."""
        names = sorted({*self.inputs, *inputs})
        return next((name for name in names if self.inputs.get(name) != inputs.get(name)), None)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON, the schema number included."""
        return {"schema": SCHEMA, **self.model_dump(mode="json")}

    @classmethod
    def from_json(cls, value: Mapping[str, Any], *, where: str) -> "Manifest":
        """Return the manifest that `to_json` wrote; `where` names it in errors.

        Raises:
            ConfigError: another version of stillhouse wrote it.
        """
        found = value.get("schema")
        problem = f"it has schema {found}, expected {SCHEMA}"
        if found == SCHEMA:
            try:
                return cls.model_validate({key: item for key, item in value.items() if key != "schema"})
            except ValidationError as error:
                first = error.errors()[0]
                problem = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise ConfigError(
            f"the manifest {where} was written by another version of stillhouse ({problem}); use another store "
            "(--store), or the version that wrote this one"
        )
