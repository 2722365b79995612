"""Sums over documents, written and read again."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from stages.errors import StageFailed
from stages.formats.documents import ModelDocuments, read_documents, write_documents
from stages.storage import Folder
from tests.fakes import artifact_of


def made(seed: int, *, base: bool) -> ModelDocuments:
    rng = np.random.default_rng(seed)
    numbers = np.array([9, 4, 7])
    nll, kl, kl_to_base = rng.random((3, 3))
    tokens, agree, agree_with_base = rng.integers(1, 9, (3, 3))
    about_base = (kl_to_base, agree_with_base) if base else (None, None)
    return ModelDocuments(numbers, tokens, nll, kl, agree, *about_base)


def test_documents_are_read_again_by_model_and_sorted(tmp_path):
    written = {"plain": made(0, base=False), "small": made(1, base=True)}
    write_documents(Folder.at(tmp_path), written)
    found = read_documents(artifact_of("scores", tmp_path))
    assert list(found) == ["plain", "small"]
    for name, documents in written.items():
        order = np.argsort(documents.document_id)
        assert found[name].document_id.tolist() == [4, 7, 9]
        for column in ("tokens", "nll", "kl", "agree", "kl_to_base", "agree_with_base"):
            before, after = getattr(documents, column), getattr(found[name], column)
            assert (after is None) == (before is None)
            assert before is None or (after == before[order]).all()


def test_documents_with_other_columns_are_refused(tmp_path):
    write_documents(Folder.at(tmp_path), {"plain": made(0, base=False)})
    path = tmp_path / "documents.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["kl"]), path)
    with pytest.raises(StageFailed, match=r"documents\.parquet of the scores artifact .* has the columns model,"):
        read_documents(artifact_of("scores", tmp_path))
