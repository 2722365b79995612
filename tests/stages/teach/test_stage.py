"""`Teach` on a real Ray: what is stored, going on by receipts, and what is refused."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from stages.contract import Shards, read_receipts
from stages.errors import StageFailed
from stages.formats.signals import SignalsInfo
from stages.models.checkpoints import load_model
from stages.teach.stage import Teach, TopK
from tests import references
from tests.fakes import fake_context
from tests.stages.tiny import artifact_of_context, tiny_llama, write_dataset, write_model

K, TEMPERATURES = 8, (1.0, 2.0, 4.0)


def _inputs(folder: Path, **model_options: object) -> dict[str, object]:
    data = write_dataset(folder / "data")
    teacher = write_model(folder / "teacher", tiny_llama(**model_options), folder / "data" / "tokenizer")
    return {"teacher": teacher, "data": data}


def _rows(path: Path) -> dict[bytes, dict[str, np.ndarray]]:
    table = pq.read_table(path).to_pydict()
    shapes = {"ids": ("<i4", K), "log_probs": ("<f2", K), "tail_log_mass": ("<f4", 1), "log_partitions": ("<f4", 3)}
    return {
        digest: {
            name: np.frombuffer(table[name][i], dtype).reshape(-1, width) for name, (dtype, width) in shapes.items()
        }
        for i, digest in enumerate(table["digest"])
    }


@pytest.mark.ray
@pytest.mark.parametrize("workers", [1, 2])
def test_teach_on_a_tiny_model_stores_what_the_dense_softmax_says(
    local_ray: None, tmp_path: Path, workers: int
) -> None:
    # The teacher's head is padded beyond the tokenizer: those logits must not enter the softmax.
    inputs = _inputs(tmp_path, vocabulary=128)
    context = fake_context(tmp_path / "step", inputs, workers=workers, cpus_per_worker=1)
    outcome = Teach(method=TopK(k=K, temperatures=TEMPERATURES)).run(context)
    signals = artifact_of_context("signals", context)

    model = load_model(inputs["teacher"].folder("model"))
    for name in ("train-00000-00000", "train-00001-00000", "train-00002-00000"):
        (path,) = signals.paths(f"signals/{name}.parquet")
        (tokens,) = inputs["data"].paths(f"tokens/{name}.parquet")
        found = _rows(path)
        table = pq.read_table(tokens).to_pydict()
        for digest, input_ids in zip(table["digest"], table["input_ids"], strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([input_ids])).logits[0, :, :96].double().numpy()
            row, log_p = found[digest], references.log_softmax(logits)
            assert np.array_equal(row["ids"], np.argsort(-log_p, axis=1, kind="stable")[:, :K])
            np.testing.assert_allclose(row["log_probs"], np.take_along_axis(log_p, row["ids"], 1), rtol=1e-3, atol=1e-3)
            np.testing.assert_allclose(
                row["tail_log_mass"][:, 0], references.tail_log_mass(logits, row["ids"]), atol=1e-4
            )
            for column, tau in enumerate(TEMPERATURES):
                np.testing.assert_allclose(
                    row["log_partitions"][:, column], references.log_partition(logits, tau), atol=1e-5
                )

    summary = SignalsInfo.read(signals)
    assert (summary.rows, summary.tokens, summary.k) == (18, 18 * 16, K)
    assert outcome.metrics["teach/tokens"] == 18 * 16
    assert context.reporter.progressed[-1] == (18 * 16, 18 * 16, "tokens")


@pytest.mark.ray
def test_teach_after_a_crash_does_only_shards_without_a_receipt(local_ray: None, tmp_path: Path) -> None:
    inputs = _inputs(tmp_path)
    first = fake_context(tmp_path / "step", inputs)
    stage = Teach(method=TopK(k=K))
    Shards(first.out, first.resume).write(
        "signals/train-00001-00000.parquet", b"kept", {"rows": 7, "tokens": 112, "size_bytes": 4, "seconds": 1.0}
    )
    stage.run(first)
    receipts = {file.name: file for file in read_receipts(first.resume)}
    assert Path(receipts["signals/train-00001-00000.parquet"].uri).read_bytes() == b"kept"
    assert len(receipts) == 3

    again = fake_context(tmp_path / "step", inputs)
    stage.run(again)  # nothing is missing: no actor starts
    assert again.reporter.progressed == []
    assert {file.name: file.sha256 for file in read_receipts(again.resume)} == {
        n: f.sha256 for n, f in receipts.items()
    }


@pytest.mark.ray
def test_teach_with_a_nan_teacher_fails_naming_the_row(local_ray: None, tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data")
    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    inputs = {"teacher": write_model(tmp_path / "teacher", model), "data": data}
    with pytest.raises(
        StageFailed, match=r"^[^\n]*NaN or infinite at 16 tokens of the row with digest [0-9a-f]{32}[^\n]*$"
    ) as caught:
        Teach(method=TopK(k=K)).run(fake_context(tmp_path / "step", inputs))
    assert type(caught.value) is StageFailed


@pytest.mark.ray
def test_teach_with_another_tokenizer_is_refused(local_ray: None, tmp_path: Path) -> None:
    inputs = _inputs(tmp_path)
    write_dataset(tmp_path / "other", vocabulary=95)
    inputs["teacher"] = write_model(tmp_path / "teacher2", tiny_llama(), tmp_path / "other" / "tokenizer")
    with pytest.raises(StageFailed, match="the teacher has another tokenizer"):
        Teach().run(fake_context(tmp_path / "step", inputs))


def test_teach_with_receipts_of_another_version_says_so(tmp_path: Path) -> None:
    context = fake_context(tmp_path / "step", _inputs(tmp_path))
    Shards(context.out, context.resume).write("signals/train-00001-00000.parquet", b"kept", {"rows": 7, "bytes": 4})
    with pytest.raises(StageFailed, match=r"receipts of signal shards .* of another version .* into another store"):
        Teach().run(context)


def test_teach_with_k_above_the_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StageFailed, match="k is 97, expected at most"):
        Teach(method=TopK(k=97)).run(fake_context(tmp_path / "step", _inputs(tmp_path)))


def test_teach_of_a_split_without_shards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StageFailed, match="no shards of split 'validation'"):
        Teach(split="validation").run(fake_context(tmp_path / "step", _inputs(tmp_path)))


@pytest.mark.parametrize("temperatures", [(), (0.0,), (1.0, 1.0), (-2.0, 1.0)])
def test_top_k_with_meaningless_temperatures_is_refused(temperatures: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="expected one or more distinct numbers above 0"):
        TopK(temperatures=temperatures)
