"""The base of every artifact's JSON: a frozen model with a schema number, written and read through itself only.

Promises: what is written is read again as the same value; a file of another schema, or that is not what its model says,
is an error that names the file, the artifact and the field, never a `KeyError` in a stage hours later.
"""

import json
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from stages.contract import Artifact
from stages.errors import StageFailed
from stages.storage import File, Folder

__all__ = ["FormatModel", "JsonFormat"]


class FormatModel(BaseModel):
    """A part of an artifact's JSON; unknown fields are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, ser_json_inf_nan="strings")


class JsonFormat(FormatModel):
    """One JSON file of an artifact."""

    FILE: ClassVar[str]
    """Its logical name in the artifact."""
    SCHEMA: ClassVar[int] = 1
    """Raised with each change of the fields below that an older or newer reader could not read."""

    @classmethod
    def read(cls, artifact: Artifact) -> Self:
        """Read an artifact's file.

        Raises:
            StageFailed: the artifact has no such file, or it is of another schema.
        """
        where = f"{cls.FILE} of the {artifact.kind} artifact {artifact.fingerprint[:12]}"
        if not artifact.below(cls.FILE):
            raise StageFailed(f"there is no {where}; run the step that makes it again")
        return cls.parse(artifact.read_bytes(cls.FILE), where=where)

    @classmethod
    def parse(cls, data: bytes, *, where: str) -> Self:
        """Read the bytes of a file; `where` names it in errors.

        Raises:
            StageFailed: it is of another schema, or not what the model says.
        """
        try:
            value = json.loads(data)
            found = value.pop("schema", None) if isinstance(value, dict) else None
            if found != cls.SCHEMA:
                raise StageFailed(
                    f"{where} has schema {found}, expected {cls.SCHEMA}: another version of stillhouse wrote it; run "
                    "the step that makes it again with this version, into another store"
                )
            return cls.model_validate(value)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            raise StageFailed(f"{where} is not what this version reads: {field}: {first['msg']}") from error
        except ValueError as error:
            raise StageFailed(f"{where} is not JSON: {error}") from error

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON, the schema number included."""
        return {"schema": self.SCHEMA, **self.model_dump(mode="json")}

    def write(self, out: Folder) -> File:
        """Write the file into an attempt's folder."""
        return out.put_json(self.FILE, self.to_json())
