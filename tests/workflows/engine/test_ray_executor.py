"""`RayExecutor` on a cluster of two nodes."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from stages.errors import ConfigError
from stages.storage import Folder
from workflows.engine.ray_executor import RayExecutor, probe

pytestmark = pytest.mark.ray


@dataclass(frozen=True)
class NodeFolder(Folder):
    """A folder that one node alone sees, as a local disk is."""

    node: str = ""

    def has(self, name: str) -> bool:
        """Return what a look from this node finds."""
        return ray.get_runtime_context().get_node_id() == self.node


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayExecutor]:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    folder = tmp_path_factory.mktemp("project")
    (folder / "datasets").mkdir()
    (folder / "datasets" / "__init__.py").touch()
    before = Path.cwd()
    os.chdir(folder)
    tasks = RayExecutor(address=cluster.address)
    tasks.start()
    os.chdir(before)
    yield tasks
    tasks.close()
    cluster.shutdown()


def test_shape_counts_every_node_and_knows_the_largest(tasks: RayExecutor) -> None:
    shape = tasks.cluster_resources()
    assert (shape.cpus, shape.largest_node_cpus, shape.gpus) == (3, 2, 0)


def test_worker_imports_libraries_whatever_the_users_folder_holds(tasks: RayExecutor) -> None:
    def where() -> str | None:
        import datasets

        return datasets.__file__

    assert "site-packages" in str(ray.get(ray.remote(num_cpus=0)(where).remote()))


def test_store_that_every_node_sees_is_accepted_and_left_as_it_was(tasks: RayExecutor, tmp_path: Path) -> None:
    tasks.check_store_is_shared(Folder(str(tmp_path)))
    assert not list(tmp_path.iterdir())


def test_store_that_one_node_cannot_see_is_refused_by_name_of_the_node(tasks: RayExecutor, tmp_path: Path) -> None:
    store = NodeFolder(str(tmp_path), node=ray.get_runtime_context().get_node_id())
    with pytest.raises(ConfigError, match=r"is not the same folder on node .*; use a shared file system or s3://"):
        tasks.check_store_is_shared(store)


def test_address_where_nothing_answers_is_refused_within_seconds() -> None:
    with pytest.raises(ConfigError, match=r"no Ray cluster answers at '127\.0\.0\.1:9'"):
        probe("127.0.0.1:9")
