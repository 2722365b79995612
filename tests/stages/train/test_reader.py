"""The reader: one order for any number of workers, rows once an epoch, signals with their own row."""

from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from stages.contract import Artifact
from stages.errors import StageFailed
from stages.train.reader import Reader
from stages.train.windows import ShardPair, SignalsLayout
from tests import references
from tests.stages.tiny import tiny_llama, write_dataset
from tests.stages.train.signals import write_signals

LAYOUT = SignalsLayout(8, (1.0, 2.0))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return write_dataset(tmp_path_factory.mktemp("data"), shards=(5, 7, 6, 4, 3))


@pytest.fixture(scope="module")
def signals(data: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return write_signals(tmp_path_factory.mktemp("signals"), data, tiny_llama())


def _reader(data: Artifact, signals: Artifact | None = None, **options: object) -> Reader:
    stored = signals.paths("signals/*.parquet") if signals else [None] * 5
    pairs = tuple(ShardPair(a, b) for a, b in zip(data.paths("tokens/*.parquet"), stored, strict=True))
    settings = {"batch_rows": 4, "micro_batch": 2, "seed": 3, **options}
    return Reader(pairs, LAYOUT if signals else None, **settings)  # type: ignore[arg-type]


def _rows(reader: Reader, first: int, last: int) -> list[list[tuple[int, ...]]]:
    """Token rows of each step, micro-batches joined."""
    return [
        [tuple(row) for batch in step.micro_batches for row in batch.input_ids_BT.tolist()]
        for step in reader.steps(first, last)
    ]


def test_reader_over_an_epoch_gives_every_row_once(data: Artifact) -> None:
    rows = list(chain(*_rows(_reader(data, batch_rows=5), 0, 5)))
    stored = [
        tuple(row) for path in data.paths("tokens/*.parquet") for row in pq.read_table(path)["input_ids"].to_pylist()
    ]
    assert sorted(rows) == sorted(stored)
    assert rows != stored


def test_reader_in_the_next_epoch_gives_another_order(data: Artifact) -> None:
    steps = _rows(_reader(data, batch_rows=25), 0, 2)
    assert sorted(steps[0]) == sorted(steps[1])
    assert steps[0] != steps[1]


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("micro_batch", [1, 4])
def test_reader_with_more_workers_gives_the_same_batches(data: Artifact, world_size: int, micro_batch: int) -> None:
    alone = _rows(_reader(data), 0, 15)
    ranks = [_reader(data, rank=rank, world_size=world_size, micro_batch=micro_batch) for rank in range(world_size)]
    shared = [list(chain(*parts)) for parts in zip(*(_rows(rank, 0, 15) for rank in ranks), strict=True)]
    assert shared == alone
    for parts in zip(*(rank.steps(0, 15) for rank in ranks), strict=True):
        targets = sum(len(batch.targets_M) for part in parts for batch in part.micro_batches)
        assert {part.num_targets for part in parts} == {targets}


@pytest.mark.parametrize("first", [1, 6, 7, 14])
def test_reader_from_a_later_step_gives_the_same_rest(data: Artifact, first: int) -> None:
    assert _rows(_reader(data), first, 20) == _rows(_reader(data), 0, 20)[first:]


def test_reader_with_another_seed_gives_another_order(data: Artifact) -> None:
    assert _rows(_reader(data, seed=4), 0, 3) != _rows(_reader(data), 0, 3)


def test_reader_targets_are_the_next_unmasked_tokens(data: Artifact) -> None:
    masks = {
        tuple(row): mask
        for path in data.paths("tokens/*.parquet")
        for row, mask in zip(
            *(pq.read_table(path)[name].to_pylist() for name in ("input_ids", "loss_mask")), strict=True
        )
    }
    for step in _reader(data).steps(0, 6):
        for batch in step.micro_batches:
            flat = []
            for index, row in enumerate(batch.input_ids_BT.tolist()):
                mask = masks[tuple(row)]
                flat += [(index * len(row) + t, row[t + 1]) for t in range(len(row) - 1) if mask[t + 1]]
            assert list(zip(batch.positions_M.tolist(), batch.targets_M.tolist(), strict=True)) == flat


def test_reader_joins_signals_to_the_tokens_they_were_made_of(data: Artifact, signals: Artifact) -> None:
    model = tiny_llama()
    for step in _reader(data, signals).steps(0, 4):
        for batch in step.micro_batches:
            with torch.no_grad():
                logits = model(input_ids=batch.input_ids_BT).logits.flatten(0, 1)[batch.positions_M].double().numpy()
            stored = batch.signals
            assert stored is not None
            expected = np.take_along_axis(references.log_softmax(logits), stored.ids_MK.numpy(), 1)
            np.testing.assert_allclose(stored.log_probs_MK.float().numpy(), expected, rtol=2e-3, atol=2e-3)
            np.testing.assert_allclose(
                stored.log_partitions_MC[:, 1].numpy(), references.log_partition(logits, 2.0), rtol=1e-4, atol=1e-4
            )


def test_reader_reads_only_the_columns_that_are_wanted(data: Artifact, signals: Artifact) -> None:
    pairs = zip(data.paths("tokens/*.parquet"), signals.paths("signals/*.parquet"), strict=True)
    layout = SignalsLayout(8, (1.0, 2.0), ("ids", "tail_log_mass"))
    reader = Reader(tuple(ShardPair(*pair) for pair in pairs), layout, batch_rows=4, micro_batch=2, seed=3)
    for wanted, whole in zip(reader.steps(0, 2), _reader(data, signals).steps(0, 2), strict=True):
        for found, expected in zip(wanted.micro_batches, whole.micro_batches, strict=True):
            assert found.signals is not None
            assert expected.signals is not None
            assert torch.equal(found.signals.ids_MK, expected.signals.ids_MK)
            assert torch.equal(found.signals.tail_log_mass_M, expected.signals.tail_log_mass_M)
            assert found.signals.log_probs_MK.numel() == found.signals.log_partitions_MC.numel() == 0


def test_reader_without_signals_for_some_rows_fails_with_their_number(
    data: Artifact, signals: Artifact, tmp_path: Path
) -> None:
    (path, *_) = signals.paths("signals/*.parquet")
    (tmp_path / "cut.parquet").write_bytes(b"")
    pq.write_table(pq.read_table(path).slice(2), tmp_path / "cut.parquet")
    reader = Reader(
        (ShardPair(data.paths("tokens/*.parquet")[0], tmp_path / "cut.parquet"),),
        LAYOUT,
        batch_rows=2,
        micro_batch=2,
        seed=0,
    )
    with pytest.raises(StageFailed, match=r"2 of 5 rows of train-00000-00000.parquet have no signals .* run Teach"):
        next(reader.steps(0, 1))


def test_reader_of_an_empty_dataset_fails(tmp_path: Path) -> None:
    empty = write_dataset(tmp_path, shards=(0,))
    reader = Reader((ShardPair(empty.paths("tokens/*.parquet")[0], None),), None, batch_rows=2, micro_batch=2, seed=0)
    with pytest.raises(StageFailed, match="hold no rows"):
        next(reader.steps(0, 1))
