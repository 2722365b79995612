"""A tiny dataset with signals, once for a file of tests."""

import pytest

from stages.contract import Artifact
from tests.stages.tiny import tiny_llama, write_dataset
from tests.stages.train.signals import write_signals


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Artifact]:
    data = write_dataset(tmp_path_factory.mktemp("data"))
    return data, write_signals(tmp_path_factory.mktemp("signals"), data, tiny_llama(seed=1))
