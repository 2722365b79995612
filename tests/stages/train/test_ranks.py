"""Two ranks of a training in processes of their own, joined by gloo, as Ray Train joins them."""

import datetime
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.train.batches import MicroBatch, StepBatch
from stages.train.forward import LossSum
from stages.train.loop import Ranks, Training
from stages.train.objectives import CrossEntropy
from stages.train.progress import Progress
from stages.train.recipe import AdamW, Recipe
from tests.fakes import RecordingReporter

LENGTHS = ([16], [3, 4, 9])
"""Of the segments in each rank's row, which have as many forward passes in a model that takes each alone."""


class Rows:
    """A rank's one row, again and again."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths

    def steps(self, first: int, end: int) -> Iterator[StepBatch]:
        ids = torch.randint(64, (1, 16), generator=torch.Generator().manual_seed(1))
        positions = torch.cat([torch.arange(length) for length in self.lengths])[None]
        targets = torch.tensor([0, 1])
        for _ in range(first, end):
            yield StepBatch((MicroBatch(ids, positions, targets, ids.flatten()[1:3], None),), 4, 32)


def _train(rank: int, folder: str) -> None:
    from transformers import AutoModelForCausalLM, Lfm2Config

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=30)
    )
    torch.manual_seed(0)
    config = Lfm2Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    assert list(model.buffers()), "it has buffers that could be sent"
    reader: Any = Rows(LENGTHS[rank])
    recipe = Recipe(AdamW(), 3, 0.0, "cosine", 0.1, 1.0, 0.5, "float32", 0)
    losses = LossSum((CrossEntropy(),), 64, whole_rows=False)
    done = Training(model, reader, losses, recipe, RecordingReporter(), Ranks(rank, 2)).run(Progress())
    torch.save({"step": done.step, "weights": model.state_dict()}, f"{folder}/{rank}.pt")


@pytest.mark.ray  # two processes: as slow as a real Ray
def test_ranks_whose_segments_run_alone_and_are_of_different_numbers_end_with_equal_weights(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_train, args=(str(tmp_path),), nprocs=2)
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert one["step"] == other["step"] == 3
    for name, tensor in one["weights"].items():
        assert torch.equal(tensor, other["weights"][name]), name
