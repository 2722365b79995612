"""`documents.parquet`: for each model that was scored, sums over the targets of each document; written and read here.

Every figure of `scores.json` is a sum of these over all documents, divided by the number of targets; intervals come
from drawing documents. The reference has its rows too, under `REFERENCE` where it is not among the models.

Shapes: D documents of one model.
"""

import io
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from stages.contract import Artifact
from stages.errors import StageFailed
from stages.storage import File, Folder

__all__ = ["FILE", "ModelDocuments", "read_documents", "write_documents"]

FILE = "documents.parquet"
SCHEMA = pa.schema(
    {
        "model": pa.string(),
        "document_id": pa.int64(),
        "tokens": pa.int64(),
        "nll": pa.float64(),
        "kl": pa.float64(),
        "agree": pa.int64(),
        "kl_to_base": pa.float64(),
        "agree_with_base": pa.int64(),
    }
)


@dataclass(frozen=True, slots=True)
class ModelDocuments:
    """One model's sums over the targets of each document, as columns `[D]`."""

    document_id: NDArray[np.int64]
    tokens: NDArray[np.int64]
    """Targets."""
    nll: NDArray[np.float64]
    """Negative log-likelihood, nats."""
    kl: NDArray[np.float64]
    """KL(reference ‖ model), nats."""
    agree: NDArray[np.int64]
    """Targets for which the model and the reference find the same token likeliest."""
    kl_to_base: NDArray[np.float64] | None = None
    """KL(base ‖ model), nats; None for a model that has no base."""
    agree_with_base: NDArray[np.int64] | None = None


def write_documents(out: Folder, models: Mapping[str, ModelDocuments]) -> File:
    """Write the rows of all models, by name."""
    tables = []
    for name, documents in models.items():
        columns = {field.name: getattr(documents, field.name) for field in fields(documents)}
        num = len(documents.document_id)
        known = {
            key: pa.nulls(num, SCHEMA.field(key).type) if values is None else pa.array(values, SCHEMA.field(key).type)
            for key, values in columns.items()
        }
        tables.append(pa.table({"model": pa.array([name] * num, pa.string()), **known}, schema=SCHEMA))
    sink = io.BytesIO()
    pq.write_table(pa.concat_tables(tables), sink, compression="zstd")
    return out.put(FILE, sink.getvalue())


def read_documents(artifact: Artifact) -> dict[str, ModelDocuments]:
    """Read the rows of all models, by name, each sorted by document.

    Raises:
        StageFailed: the file has other columns: another version wrote it.
    """
    table = pq.read_table(artifact.paths(FILE)[0])
    if table.schema.names != SCHEMA.names:
        raise StageFailed(
            f"{FILE} of the {artifact.kind} artifact {artifact.fingerprint[:12]} has the columns "
            f"{', '.join(table.schema.names)}, expected {', '.join(SCHEMA.names)}; run the step that makes it again"
        )
    columns: dict[str, NDArray[Any]] = {name: table[name].to_numpy() for name in table.column_names}
    found = {}
    for name in dict.fromkeys(columns.pop("model").tolist()):
        rows = np.flatnonzero(table["model"].to_numpy() == name)
        rows = rows[np.argsort(columns["document_id"][rows], kind="stable")]
        own: dict[str, Any] = {key: values[rows] for key, values in columns.items()}
        for key in ("kl_to_base", "agree_with_base"):
            if np.isnan(own[key].astype(float)).any():  # nulls
                own[key] = None
        found[name] = ModelDocuments(**own)
    return found
