"""Signal shards: columns come back bit for bit, each alone, whatever the records that they were written in."""

from pathlib import Path

import numpy as np
import pytest

from stages.formats import signal_shards
from stages.formats.signal_shards import SignalColumn

ROWS, LENGTH, K, TEMPERATURES = 5, 4, 3, 2
WIDTHS: dict[SignalColumn, int] = {"ids": K, "log_probs": K, "tail_log_mass": 1, "log_partitions": TEMPERATURES}


def values_of(rows: int, seed: int) -> dict[SignalColumn, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "ids": rng.integers(0, 1000, (rows * LENGTH, K), dtype=np.int32),
        "log_probs": rng.normal(size=(rows * LENGTH, K)).astype(np.float16),
        "tail_log_mass": np.where(rng.random(rows * LENGTH) < 0.2, -np.inf, -1.5).astype(np.float32),
        "log_partitions": rng.normal(size=(rows * LENGTH, TEMPERATURES)).astype(np.float32),
    }


@pytest.mark.parametrize("record_rows", [1, 2, ROWS])
def test_columns_are_read_bit_for_bit_whatever_the_records(tmp_path: Path, record_rows: int) -> None:
    digests = [bytes([row] * 16) for row in range(ROWS)]
    values = values_of(ROWS, seed=0)
    path = tmp_path / "a.parquet"
    with path.open("wb") as sink, signal_shards.writer(sink) as write:
        for start in range(0, ROWS, record_rows):
            part = slice(start * LENGTH, (start + record_rows) * LENGTH)
            chunk = {name: column[part] for name, column in values.items()}
            write(signal_shards.record(digests[start : start + record_rows], chunk))
    assert signal_shards.read_digests(path) == digests
    for name, width in WIDTHS.items():
        found = signal_shards.read_column(path, name, width=width)
        assert found.shape == (ROWS, LENGTH, width)
        assert found.dtype == values[name].dtype
        np.testing.assert_array_equal(found.reshape(values[name].shape), values[name])


def test_signals_shard_is_named_after_its_token_shard() -> None:
    assert signal_shards.signals_name("tokens/train-00003.parquet") == "signals/train-00003.parquet"
